"""Every public name of torch.ao's observers has what stands for it, or a reason why nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from qfunc import Cast, Dynamic, FixedQParams, KeepFloat, QuantSpec, ReuseInput
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.recording import Recording
from qfunc.testing import oracle
from tests.parity.observer_meaning import meaning
from tests.parity.observer_sides import Found, agree

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

INT8_EPS = 2.0**-12
SYMMETRIC_127 = QuantSpec("int8", -127, 127, "per_tensor_symmetric", None, INT8_EPS)
CHANNELS_127 = QuantSpec("int8", -127, 127, "per_channel_symmetric", 0, INT8_EPS)
UNIT, TANH = FixedQParams(q.UINT8, 1 / 256, 0), FixedQParams(q.UINT8, 2 / 256, 128)

OBSERVERS: dict[str, Any] = {
    "MinMaxObserver": o.MinMax(),
    "MovingAverageMinMaxObserver": o.MovingAverageMinMax(),
    "PerChannelMinMaxObserver": o.PerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 0)),
    "MovingAveragePerChannelMinMaxObserver": o.MovingAveragePerChannelMinMax(
        QuantSpec("uint8", 0, 255, "per_channel_affine", 0)
    ),
    "HistogramObserver": o.Histogram(),
    "NoopObserver": KeepFloat(),
    "PlaceholderObserver": KeepFloat(),
    "ReuseInputObserver": ReuseInput(),
    "default_observer": o.MinMax(q.UINT8_REDUCED),
    "default_histogram_observer": o.Histogram(q.UINT8_REDUCED),
    "default_weight_observer": o.MinMax(q.INT8_SYMMETRIC),
    "weight_observer_range_neg_127_to_127": o.MinMax(SYMMETRIC_127),
    "default_per_channel_weight_observer": o.PerChannelMinMax(q.INT8_SYMMETRIC_PER_CHANNEL),
    "per_channel_weight_observer_range_neg_127_to_127": o.PerChannelMinMax(CHANNELS_127),
    "default_float_qparams_observer": o.PerChannelMinMax(q.UINT8_FLOAT_QPARAMS),
    "default_float_qparams_observer_4bit": o.PerChannelMinMax(q.UINT4_FLOAT_QPARAMS),
    "default_fixed_qparams_range_0to1_observer": UNIT,
    "default_affine_fixed_qparams_observer": UNIT,
    "default_fixed_qparams_range_neg1to1_observer": TANH,
    "default_symmetric_fixed_qparams_observer": TANH,
    "default_dynamic_quant_observer": Dynamic(q.UINT8),
    "default_placeholder_observer": KeepFloat(),
    "default_reuse_input_observer": ReuseInput(),
}
"""What stands for each name when it is called without arguments."""


@dataclass(frozen=True, slots=True)
class Meant:
    """An observer of torch.ao's that is nothing without arguments, or other things with them."""

    name: str
    arguments: tuple[tuple[str, Any], ...]
    ours: Any


WITH_ARGUMENTS = (
    Meant("FixedQParamsObserver", (("scale", 0.5), ("zero_point", 3)), FixedQParams(q.UINT8, 0.5, 3)),
    Meant("PlaceholderObserver", (("dtype", torch.float16),), Cast("float16")),
    Meant("PlaceholderObserver", (("dtype", torch.float16), ("is_dynamic", True)), Cast("float16", dynamic=True)),
    Meant(
        "PlaceholderObserver",
        (("dtype", torch.qint8), ("quant_min", -128), ("quant_max", 127), ("is_dynamic", True)),
        Dynamic(q.INT8),
    ),
    Meant("MovingAverageMinMaxObserver", (("averaging_constant", 1), ("is_dynamic", True)), Dynamic(q.UINT8)),
)

RECORDING = "Recording: it keeps the same tensors, and has the qparams of their range besides"
BASE = "a base class of observers; ours satisfy the protocol `qfunc.numerics.observers.Observer`"
TORCHAO = "of torchao's quantization, which torch.ao's FX mode does not use: no observer, and nothing in it measures"
STATE = "a statistic is a value: it is kept by keeping the calibrated stage"

WITHOUT: dict[str, str] = {
    "RecordingObserver": RECORDING,
    "default_debug_observer": RECORDING,
    "ObserverBase": BASE,
    "UniformQuantizationObserverBase": BASE,
    "AffineQuantizedObserverBase": TORCHAO,
    **dict.fromkeys(("Granularity", "PerAxis", "PerBlock", "PerGroup", "PerRow", "PerTensor", "PerToken"), TORCHAO),
    **dict.fromkeys(("MappingType", "TorchAODType", "ZeroPointDomain", "get_block_size"), TORCHAO),
    "get_observer_state_dict": STATE,
    "load_observer_state_dict": STATE,
}
"""Names with nothing of their own in qfunc, and why."""

NAMES = oracle.named_observers() if oracle.available() else {}


def test_every_name_is_in_the_table_once():
    tables = [{*OBSERVERS}, {meant.name for meant in WITH_ARGUMENTS} - OBSERVERS.keys(), {*WITHOUT}]
    assert sorted(NAMES) == sorted(name for table in tables for name in table)


@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_each_name_means(name):
    assert meaning(NAMES[name]) == OBSERVERS[name]
    _same_qparams(NAMES[name], OBSERVERS[name])


@pytest.mark.parametrize("meant", WITH_ARGUMENTS, ids=str)
def test_what_arguments_mean(meant):
    constructor = partial(NAMES[meant.name], **dict(meant.arguments))
    assert meaning(constructor) == meant.ours
    _same_qparams(constructor, meant.ours)


def _same_qparams(constructor: Callable[[], Any], ours: Any) -> None:
    """On three tensors; what measures nothing raises in torch.ao when it is asked."""
    theirs = constructor()
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 50, generator=g) * spread + 0.2 for spread in (1.0, 3.0, 0.1)]
    for x in tensors:
        theirs(x)
    if isinstance(ours, (Cast, KeepFloat, ReuseInput)) or type(theirs).__name__ == "PlaceholderObserver":
        assert not hasattr(theirs, "min_val")
        with pytest.raises(Exception, match="calculate_qparams should not be called"):
            theirs.calculate_qparams()
        return
    observer = o.MinMax(ours.spec) if isinstance(ours, Dynamic) else ours
    state = observer.init()
    for x in tensors[-1:] if isinstance(ours, Dynamic) else tensors:
        state = observer.update(state, x)
    found = observer.finish(state)
    assert found is not None
    scale, zero_point = theirs.calculate_qparams()
    mine = Found(found.scale.reshape(-1), found.zero_point.reshape(-1))
    assert agree(mine, Found(scale.reshape(-1), zero_point.reshape(-1)), ours.spec).all()


@pytest.mark.parametrize("name", [name for name, reason in WITHOUT.items() if reason is TORCHAO])
def test_what_is_no_observer(name):
    """None of these is an observer that can be made and called: no FX configuration can hold one."""
    base: Any = NAMES["ObserverBase"]
    assert not (isinstance(NAMES[name], type) and issubclass(NAMES[name], base))


def test_a_recording_keeps_the_tensors():
    recorder, ours = NAMES["default_debug_observer"](), Recording()
    state = ours.init()
    for x in (torch.ones(2), torch.tensor([[3.0]])):
        recorder(x)
        state = ours.update(state, x)
    assert NAMES["default_debug_observer"] is NAMES["RecordingObserver"]
    assert [x.tolist() for x in recorder.get_tensor_value()] == [x.tolist() for x in state.tensors]
    with pytest.raises(Exception, match="calculate_qparams should not be called"):
        recorder.calculate_qparams()


@pytest.mark.parametrize("name", [name for name, reason in WITHOUT.items() if reason is BASE])
def test_a_base_cannot_be_made(name):
    with pytest.raises(TypeError, match="abstract"):
        NAMES[name](dtype=torch.quint8)


def test_a_state_is_kept_as_a_value():
    """What `get_observer_state_dict` and `load_observer_state_dict` do: go on from a state that was kept."""
    observer, g = o.Histogram(), torch.Generator().manual_seed(0)
    first, second = torch.randn(100, generator=g), torch.randn(100, generator=g) * 2
    kept = observer.update(observer.init(), first)
    assert observer.update(kept, second) == observer.update(kept, second)
    assert observer.finish(kept) == observer.finish(observer.update(observer.init(), first))
