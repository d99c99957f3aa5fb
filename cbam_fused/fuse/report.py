"""What `fuse_` did, one row per gate: as text, as a table for rich, as a dict for programs."""

from dataclasses import asdict, dataclass, field

from torch import Tensor

from cbam_fused.costs import eager_passes, passes

FUSED = "fused"
ALREADY_FUSED = "already fused"
SKIPPED = "skipped"
CANDIDATE = "candidate"
FILTERED = "filtered out"


@dataclass(frozen=True)
class GateReport:
    """One gate of a model.

    Attributes:
        paths: the names of the module in the model; several where it is shared.
        class_name: its class.
        status: "fused", "already fused", "skipped", "candidate" or "filtered out".
        adapter: the implementation it was recognised as, "" if none.
        options: what was found: pool, maps, ties, channels, hidden units, kernel size and norm.
        epilogue: what is fused behind it in its block: "add + relu", "add", "relu" or "".
        alone: why nothing is, or a remark.
        backend: whose operations a fused gate calls on its parameters' device.
        compared: the comparison that came closest to its bound, "" if none was made.
        error, bound: its largest error and what it may be at most.
        reason: why it was skipped, what makes it a candidate, or a remark.
    """

    paths: tuple[str, ...]
    class_name: str
    status: str
    adapter: str = ""
    options: dict[str, str | int] = field(default_factory=dict)
    epilogue: str = ""
    alone: str = ""
    backend: str = ""
    compared: str = ""
    error: float | None = None
    bound: float | None = None
    reason: str = ""

    @property
    def passes(self) -> tuple[int, int] | None:
        """How often a call in eval mode reads or writes a tensor as large as x: now, and while its
        layers ran one by one, with what is now fused behind it. None for a gate that is not fused.
        """
        if self.status not in (FUSED, ALREADY_FUSED):
            return None
        has = {
            "spatial": "maps" in self.options,
            "residual": "add" in self.epilogue,
            "activation": "relu" in self.epilogue,
        }
        before = eager_passes(str(self.options["pool"]), **has)
        return sum(passes("cbam_inference", again=False, **has)), sum(before)

    def bytes_saved(self, x: Tensor) -> int:
        """Estimated: what a call on x in eval mode moves less than before; 0 if it is not fused."""
        now, before = self.passes or (0, 0)
        return (before - now) * x.numel() * x.element_size()

    def cells(self) -> tuple[str, ...]:
        """The row of the printed table."""
        paths = ", ".join(path or "(the model)" for path in self.paths)
        options = ", ".join(map(str, self.options.values()))
        error = "" if self.error is None else f"{self.error:.1e} of {self.bound:.1e}"
        status = f"{self.status}: {self.reason}" if self.reason else self.status
        epilogue = f"{self.epilogue or 'none'}: {self.alone}" if self.alone else self.epilogue
        moved = "{} of {}".format(*self.passes) if self.passes else ""
        about = paths, self.class_name, self.adapter, options, epilogue
        return *about, self.backend, moved, error, status

    def to_dict(self) -> dict:
        """The attributes, and `passes`, fit for JSON."""
        moved = None if self.passes is None else list(self.passes)
        return {**asdict(self), "paths": list(self.paths), "passes": moved}


_HEADER = (
    "path",
    "class",
    "adapter",
    "options",
    "epilogue",
    "backend",
    "passes",
    "error of bound",
    "status",
)


@dataclass(frozen=True)
class FuseReport:
    """The gates found in a model, in the order of its modules, and what became of each."""

    gates: tuple[GateReport, ...]

    def with_status(self, status: str) -> tuple[GateReport, ...]:
        """The gates of one status, as in `GateReport`."""
        return tuple(gate for gate in self.gates if gate.status == status)

    @property
    def fused(self) -> tuple[GateReport, ...]:
        """The gates that this call fused."""
        return self.with_status(FUSED)

    @property
    def skipped(self) -> tuple[GateReport, ...]:
        """The gates that could not be fused, each with its reason."""
        return self.with_status(SKIPPED)

    @property
    def candidates(self) -> tuple[GateReport, ...]:
        """Modules with the layers of a CBAM that no adapter knows."""
        return self.with_status(CANDIDATE)

    @property
    def summary(self) -> str:
        """One line: how many gates of each status, or that there are none."""
        if not self.gates:
            return "fuse_: the model contains no CBAM that is known here; nothing was fused"
        counts = {status: len(self.with_status(status)) for status in _STATUSES}
        return "fuse_: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)

    def to_dict(self) -> dict:
        """``{"summary": str, "gates": [{"paths": [...], ...}, ...]}``, fit for JSON."""
        gates = [gate.to_dict() for gate in self.gates]
        return {"summary": self.summary, "gates": gates}

    def __str__(self) -> str:
        if not self.gates:
            return self.summary
        rows = [_HEADER, *(gate.cells() for gate in self.gates)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join((self.summary, *lines))

    def __rich__(self):
        from rich.table import Table

        table = Table(title=self.summary, title_justify="left")
        for name in _HEADER:
            table.add_column(name, overflow="fold")
        for gate in self.gates:
            table.add_row(*gate.cells())
        return table


_STATUSES = (FUSED, ALREADY_FUSED, SKIPPED, CANDIDATE, FILTERED)
