"""What stands for each of torch.ao's observers."""

from __future__ import annotations

from qfunc import Cast, Dynamic, FixedQParams, KeepFloat, QuantSpec, ReuseInput
from qfunc.numerics import observers
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.unmeasured import FLOATS
from qfunc.testing import oracle

RANGES = {
    "MinMaxObserver": observers.MinMax,
    "PerChannelMinMaxObserver": observers.PerChannelMinMax,
}
AVERAGES = {
    "MovingAverageMinMaxObserver": observers.MovingAverageMinMax,
    "MovingAveragePerChannelMinMaxObserver": observers.MovingAveragePerChannelMinMax,
}
"""Their classes and ours."""

UNQUANTIZED = ("NoopObserver", "Identity")
"""What torch.ao has in the place of an observer where there is nothing to quantize."""


def meaning(constructor):
    """One of torch.ao's observers as a value of ours."""
    theirs = oracle.observer_data(constructor)
    if theirs.name == "ReuseInputObserver":
        return ReuseInput()
    if theirs.name in UNQUANTIZED or (theirs.name == "PlaceholderObserver" and theirs.dtype == "float32"):
        return KeepFloat()
    if theirs.name == "PlaceholderObserver" and theirs.dtype in FLOATS:
        return Cast(theirs.dtype, dynamic=theirs.is_dynamic)
    eps = {} if theirs.eps is None else {"eps": theirs.eps}
    spec = QuantSpec(theirs.dtype, theirs.quant_min, theirs.quant_max, theirs.qscheme, theirs.ch_axis, **eps)
    if theirs.is_dynamic:
        # for training, torch.ao measures each tensor by a moving average that forgets all before it
        assert theirs.name == "PlaceholderObserver" or theirs.averaging_constant == 1
        return Dynamic(spec)
    if theirs.name in AVERAGES:
        found = AVERAGES[theirs.name](spec, theirs.averaging_constant)
    elif theirs.name == "FixedQParamsObserver":
        found = FixedQParams(spec, theirs.scale, theirs.zero_point)
    elif theirs.name == "HistogramObserver":
        found = observers.Histogram(spec, theirs.bins)
    else:
        found = RANGES[theirs.name](spec)
    return FakeQuantize(found, fused=theirs.fused) if theirs.trains else found
