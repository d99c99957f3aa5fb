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
    gate_fusion,
    tail_of,
)
from cbam_fused.fuse.swap import is_swapped_again
from cbam_fused.fuse.verify import Epilogue, verify


class Epilogues:
    """Examines the blocks around the gates of `model`, and collects in `swaps` each block to be
    fused with the class it shall have.

    If `verified`, the tail is compared once for each such class: gates of one class differ in their
    parameters, and each was compared by itself.
    """

    def __init__(self, model: nn.Module, verified: bool) -> None:
        self._model, self._verified = model, verified
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
            fused[found.epilogue] = None
            now = found.with_class(name, type(gate))
            if remark := changed(block, now) or acting(block, now):
                obstacles[f"but not while {remark}"] = None
        return {"epilogue": ", ".join(fused), "alone": "; ".join(obstacles)}

    def _fusion(self, block: nn.Module, name: str, gate: nn.Module, cls: type) -> BlockFusion:
        """How `block` is, or will be, fused. Raises NotFusableError if it cannot be."""
        taken = {id(swapped): new._cbam_block for swapped, new in self.swaps}
        known = taken.get(id(block)) or block_fusion_of(block)
        if known is None:
            fusion = describe(block, name, gate, cls)
            meta = next(gate.parameters()).is_meta
            if self._verified and not meta and fusion not in taken.values():
                epilogue = Epilogue(tail_of(fusion), fusion.activation)
                verify(gate, gate_fusion(gate, cls), epilogue)
        else:
            fusion = known.with_class(name, cls)
        fixed = block_fusion_of(block) is not None and is_swapped_again(block)
        if fusion != known and not fixed:
            self.swaps.append((block, block_class(fusion)))
        if fusion.gate != name:
            raise NotFusableError(f"its block is fused behind {fusion.gate}")
        return fusion
