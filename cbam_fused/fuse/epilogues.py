"""For each gate of a model, what of its block can be fused behind it, and the proof of that."""

from torch import nn

from cbam_fused.fuse.adapters import NotFusableError
from cbam_fused.fuse.blocks import (
    BlockFusion,
    acting,
    block_class,
    block_fusion_of,
    changed,
    describe,
    epilogue_of,
    gate_fusion,
)
from cbam_fused.fuse.swap import is_swapped_again
from cbam_fused.fuse.verify import verify


class Epilogues:
    """Examines the blocks around the gates of `model`, and collects in `swaps` each block to be
    fused with the class it shall have.

    If `verified`, each tail is compared once for each such class: gates of one class differ in
    their parameters, and each was compared by itself.
    """

    def __init__(self, model: nn.Module, verified: bool) -> None:
        self._model, self._verified = model, verified
        self._classes: dict[int, dict[str, type]] = {}  # that the gates of a block will have
        self.swaps: list[tuple[nn.Module, type[nn.Module]]] = []

    def examine(self, gate: nn.Module, paths: list[str], cls: type) -> dict:
        """What the report says of a gate's epilogue: ``epilogue`` and ``alone``.

        Args:
            paths: the gate's names in the model.
            cls: the class that it has, or will have.
        """
        blocks: dict[tuple[int, str], nn.Module] = {}
        for path in paths:
            parent, _, name = path.rpartition(".")
            if path:
                block = self._model.get_submodule(parent)
                blocks.setdefault((id(block), name), block)
        fused, obstacles = {}, {} if blocks else {"it is in no block": None}
        for (_, name), block in blocks.items():
            try:
                found = self._fusion(block, name, gate, cls)
            except NotFusableError as obstacle:
                obstacles[str(obstacle)] = None
                continue
            tail = found.tail_of(name)
            fused[tail.epilogue] = None
            if remark := changed(block, _now(block, found)) or acting(block, tail):
                obstacles[f"but not while {remark}"] = None
        return {"epilogue": ", ".join(fused), "alone": "; ".join(obstacles)}

    def _fusion(self, block: nn.Module, name: str, gate: nn.Module, cls: type) -> BlockFusion:
        """How `block` is, or will be, fused. Raises NotFusableError if it cannot be."""
        self._classes.setdefault(id(block), {})[name] = cls
        taken = (new._cbam_block for swapped, new in reversed(self.swaps) if swapped is block)
        known = next(taken, block_fusion_of(block))
        fusion, obstacle = known and known.with_class(name, cls), None
        fixed = block_fusion_of(block) is not None and is_swapped_again(block)
        if fusion is None or not fusion.tail_of(name):
            try:
                if fixed:
                    raise NotFusableError("its block was fused before, and its class swapped again")
                fusion = self._behind_another(block, known, name, gate)
            except NotFusableError as error:
                obstacle = error
        if fusion != known and not fixed:
            self.swaps.append((block, block_class(fusion)))
        if obstacle is not None:
            raise obstacle
        return fusion

    def _behind_another(
        self, block: nn.Module, known: BlockFusion | None, name: str, gate: nn.Module
    ) -> BlockFusion:
        """How `block` is fused behind one more gate than it is `known` to be."""
        classes = self._classes[id(block)]
        others = [tail.gate for tail in known.tails if tail.gate in classes] if known else []
        fusion = describe(block, (*others, name), classes)
        seen = any(new._cbam_block == fusion for _, new in self.swaps)
        if self._verified and not seen and not next(gate.parameters()).is_meta:
            verify(gate, gate_fusion(gate, classes[name]), epilogue_of(fusion, name))
        return fusion


def _now(block: nn.Module, fusion: BlockFusion) -> BlockFusion:
    """The same with the classes that the gates have at present."""
    for tail in fusion.tails:
        if (gate := block._modules.get(tail.gate)) is not None:
            fusion = fusion.with_class(tail.gate, type(gate))
    return fusion
