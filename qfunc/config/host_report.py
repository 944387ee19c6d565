"""What is known of a machine's kernels, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

from qfunc.config.columns import aligned
from qfunc.numerics.saturation import PairLayouts


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a kernel keeps its contract on this host, and if not, why."""

    kernel: str
    ok: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """A machine as qfunc's kernels see it; prints as a table. Equal reports lower a graph equally."""

    torch_version: str
    cpu_capability: str
    """torch's choice of vector code: `AVX2`, `AVX512`, `DEFAULT`, ..."""
    isa: tuple[str, ...]
    """Integer extensions of the CPU that matter here, such as `avx512_vnni`."""
    engines: tuple[str, ...]
    """Engines of qfunc that run: `onednn`, `quantized` where torch has any of its own, and `decomposed` where torch has
    its operators."""
    quantized_engines: tuple[str, ...]
    """torch's engines for quantized tensors, sorted."""
    onednn_layouts: PairLayouts
    """Which pairs of weights the `onednn` kernels add in int16 with saturation; none on a CPU with VNNI."""
    quantized_layouts: tuple[tuple[str, PairLayouts], ...]
    """The same for each of torch's engines; fbgemm's depthwise kernels saturate on a CPU with VNNI, too."""
    verdicts: tuple[Verdict, ...]
    """One for each kernel, in the order of their names."""

    def __str__(self) -> str:
        layouts = (("onednn", self.onednn_layouts), *self.quantized_layouts)
        pairs = ", ".join(f"{name} {p.dense}/{p.depthwise}" for name, p in layouts if p.saturates)
        rows = [(v.kernel, "yes" if v.ok else "no", v.reason) for v in self.verdicts]
        return "\n".join(
            [
                f"torch {self.torch_version} on {self.title}, with {', '.join(self.isa) or 'no integer extensions'}",
                f"engines: {', '.join((*self.engines, 'reference'))}",
                f"torch's engines for quantized tensors: {', '.join(self.quantized_engines) or 'none'}",
                f"pairs that are added in 16 bits, dense/depthwise: {pairs or 'none'}",
                *aligned([("kernel", "right", "why not"), *rows]),
            ]
        )

    @property
    def title(self) -> str:
        """The machine in a few words."""
        return f"{self.cpu_capability} (VNNI)" if any("vnni" in name for name in self.isa) else self.cpu_capability

    @property
    def saturates(self) -> bool:
        """Whether the `onednn` kernels can saturate, so that weights must be limited."""
        return self.onednn_layouts.saturates

    def verdict(self, kernel: str) -> Verdict:
        """The verdict on a kernel; one that was never checked is not ok.

        >>> from qfunc.numerics.saturation import UNPAIRED
        >>> HostReport("2", "AVX2", (), (), (), UNPAIRED, (), ()).verdict("onednn.conv2d")
        Verdict(kernel='onednn.conv2d', ok=False, reason='not checked on this host')
        """
        for verdict in self.verdicts:
            if verdict.kernel == kernel:
                return verdict
        return Verdict(kernel, ok=False, reason="not checked on this host")

    def layouts(self, engine: str) -> PairLayouts:
        """The pair layouts of `onednn`, or of one of torch's engines; unknown engines count as the worst."""
        unknown = PairLayouts("any", "any")
        return self.onednn_layouts if engine == "onednn" else dict(self.quantized_layouts).get(engine, unknown)


@dataclass(frozen=True, slots=True)
class Consulted(HostReport):
    """A report that keeps which verdicts were asked for, so that a certificate can name what a kernel relies on."""

    asked: dict[str, Verdict] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, host: HostReport) -> Self:
        """The same report, of which nothing was asked yet."""
        return cls(**{each.name: getattr(host, each.name) for each in fields(HostReport)})

    def verdict(self, kernel: str) -> Verdict:
        """The verdict on a kernel, and the memory of it."""
        found = HostReport.verdict(self, kernel)
        self.asked[kernel] = found
        return found
