"""Which engine a host runs best: `engine="auto"`."""

from __future__ import annotations

from qfunc.config.host_report import HostReport
from qfunc.engines import ENGINES
from qfunc.engines.quantized import torch_engines

AUTO = "auto"
"""The name that stands for the best engine of a host."""


def runnable(host: HostReport) -> tuple[str, ...]:
    """The engines that a host runs, the preferred ones first; a report may come from anywhere, and claim others."""
    known = (name for name in host.engines if name in ENGINES and name != "reference")
    chosen = tuple(f"quantized.{name}" for name in torch_engines(host))
    return (*(name for name in known if chosen or not name.startswith("quantized")), *chosen, "reference")


def best_engine(host: HostReport) -> tuple[str, str]:
    """The first engine whose kernels for layers are there and keep their contracts, and why it is that one.

    >>> from qfunc.numerics.saturation import UNPAIRED
    >>> best_engine(HostReport("2", "AVX2", (), (), (), UNPAIRED, (), ()))[0]
    'reference'
    """
    passed_over: list[str] = []
    for engine, kernels in _layers(host):
        broken = [host.verdict(kernel) for kernel in kernels if not host.verdict(kernel).ok]
        if engine not in runnable(host):
            passed_over.append(f"{engine} does not run here")
        elif broken:
            passed_over.append(f"{broken[0].kernel} fails its contract: {broken[0].reason}")
        else:
            because = f"; {'; '.join(passed_over)}" if passed_over else ""
            return engine, f"auto is {engine}, whose kernels for layers keep their contracts here{because}"
    return "reference", f"auto is reference, which needs no kernels; {'; '.join(passed_over)}"


def _layers(host: HostReport) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The engines to choose from, in order, and of each the kernels without which it is of no use."""
    torch_engine = next(torch_engines(host), None)
    quantized = () if torch_engine is None else tuple(f"quantized.{kind}[{torch_engine}]" for kind in _KINDS)
    return (("onednn", tuple(f"onednn.{kind}" for kind in _KINDS)), ("quantized", quantized))


_KINDS = ("conv2d", "linear")
