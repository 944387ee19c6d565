"""Fake quantizers are torch.ao's, batch by batch: outputs, gradients, qparams and what was measured."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qfunc import QuantSpec, Switches, switch
from qfunc.edge.fake_quantizers import fake_quantizer
from qfunc.numerics.affine import along, fake_quantize
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import (
    Entropy,
    FixedQParams,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    Percentile,
    PerChannelMinMax,
)
from qfunc.numerics.qparams import FLOAT_QPARAMS, INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, QParams
from qfunc.numerics.unmeasured import Dynamic
from qfunc.passes.training import Start
from qfunc.testing import oracle, oracle_training
from tests.parity.observer_meaning import meaning
from tests.training.comparing import apart, assert_close, gradients

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

NAMED = oracle_training.named_fake_quantizers() if oracle.available() else {}
FUSED = tuple(name for name in NAMED if "fused" in name)


def module(quantization: Any, channels: int | None = None) -> Any:
    return fake_quantizer(Start(quantization, "x", (), channels=channels)).train()


def made(constructor: Any) -> Any:
    """One of torch.ao's, which warns of options that its own defaults have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return constructor()


def batches(seed: int, count: int = 6, shape: tuple[int, ...] = (5, 4, 7)) -> list[Tensor]:
    """Of any kind: one-sided ones, almost constant ones and zeros among them, of sizes that change.

    Of constant ones torch.ao's average, by rounding, may have a minimum above the maximum, and ours never has.
    """
    random = torch.Generator().manual_seed(seed)

    def draw(index: int) -> Tensor:
        x = torch.randn(shape, generator=random) * 10.0 ** (torch.rand(1, generator=random).item() * 3 - 2)
        kind = torch.randint(0, 8, (1,), generator=random).item()
        return {0: x.abs(), 1: -x.abs(), 2: x * 0, 3: x * 1e-3 + 0.7, 4: x + 3}.get(kind, x) * (1 + index / 2)

    return [draw(index) for index in range(count)]


def step(part: Any, x: Tensor, of: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of `of`."""
    x = x.clone().requires_grad_()
    y = part(x)
    return {"y": y.detach(), **gradients(y, {"x": x, **(of or {})})}


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Bit for bit."""
    assert torch.equal(ours.scale.detach().reshape(-1), theirs.scale.detach().reshape(-1))
    assert torch.equal(ours.zero_point.detach().reshape(-1).float(), theirs.zero_point.detach().reshape(-1).float())
    observer = theirs.activation_post_process
    if hasattr(ours, "min_val"):
        assert torch.equal(ours.min_val.reshape(-1), observer.min_val.reshape(-1))
        assert torch.equal(ours.max_val.reshape(-1), observer.max_val.reshape(-1))


def assert_same_step(ours: Any, theirs: Any, x: Tensor) -> None:
    """Bit for bit, but for zero points that are floats and ranges of one batch.

    Torch may add such a zero point and multiply at once; and torch.ao finds the range of one batch as a moving average
    that forgets, `old + (new - old)`, which is off by a rounding error. Values at a half may go either way then.
    """
    found, expected = step(ours, x), step(theirs, x)
    exact = hasattr(ours, "scale") and ours.spec.qscheme != FLOAT_QPARAMS
    if exact:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        axis = ours.spec.ch_axis
        clear = clear_of_halves(
            x, *(v.view(-1 if axis is not None else ()) for v in (theirs.scale, theirs.zero_point)), axis
        )
        assert_close({"y": found["y"][clear]}, {"y": expected["y"][clear]})
        assert torch.equal(found["x"][clear], expected["x"][clear])
    if hasattr(ours, "scale"):
        assert_same_state(ours, theirs)


def clear_of_halves(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> Tensor:
    """Where a rounding error cannot turn a value to the other neighbour."""
    steps = x / along(scale, x, axis) + along(zero_point, x, axis)
    return ((steps - steps.floor()) - 0.5).abs() > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMED if name not in FUSED])
@pytest.mark.parametrize("seed", range(2))
def test_those_with_a_name(name, seed):
    ours, theirs = module(meaning(NAMED[name])), made(NAMED[name])
    for x in batches(seed):
        assert_same_step(ours, theirs, x)


PER_TENSOR = ("MinMaxObserver", "MovingAverageMinMaxObserver", "HistogramObserver")
PER_CHANNEL = ("PerChannelMinMaxObserver", "MovingAveragePerChannelMinMaxObserver")


@st.composite
def settings(draw, observers=(*PER_TENSOR, *PER_CHANNEL), name="FakeQuantize"):
    observer = draw(st.sampled_from(observers))
    dtype = draw(st.sampled_from([torch.quint8, torch.qint8]))
    limits = [(0, 255), (0, 127), (0, 15)] if dtype == torch.quint8 else [(-128, 127), (-127, 127), (-8, 7)]
    low, high = draw(st.sampled_from(limits))
    options: dict[str, Any] = {"dtype": dtype, "quant_min": low, "quant_max": high}
    # torch.ao's middle of all unsigned integers depends on whether they are given or its default; the fused operator
    # knows nothing symmetric of them, and the first axis alone
    symmetric = dtype == torch.qint8 or (name == "FakeQuantize" and high < 255)
    schemes = ["affine", "symmetric"] if symmetric else ["affine"]
    if observer in PER_CHANNEL:
        schemes += ["affine_float_qparams"] if dtype == torch.quint8 and name == "FakeQuantize" else []
        options["ch_axis"] = draw(st.sampled_from([0, 1, 2])) if name == "FakeQuantize" else 0
    per = "per_channel" if observer in PER_CHANNEL else "per_tensor"
    options["qscheme"] = getattr(torch, f"{per}_{draw(st.sampled_from(schemes))}")
    if "Average" in observer:
        options["averaging_constant"] = draw(st.sampled_from([0.01, 0.3, 1.0]))
    if "Histogram" in observer:
        options["bins"] = 64
    if name == "FakeQuantize":
        options["eps"] = draw(st.sampled_from([2.0**-23, 2.0**-12, 0.05]))
    return oracle_training.fake_quantizer(name, observer, **options)


@given(settings(), st.integers(0, 2**31), st.booleans())
def test_of_any_observer(theirs, seed, known):
    x = batches(seed)[0]
    quantization = meaning(theirs)
    axis = quantization.spec.ch_axis
    ours, theirs = module(quantization, x.shape[axis] if known and axis is not None else None), made(theirs)
    for x in batches(seed):
        assert_same_step(ours, theirs, x)


@given(settings(), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=6), st.integers(0, 2**31))
def test_switches(theirs, turns, seed):
    """Before anything was measured torch.ao rounds to whole numbers, and ours hands values on."""
    ours, theirs = module(meaning(theirs)), made(theirs)
    given_batches = batches(seed, len(turns) + 1)
    assert_same_step(ours, theirs, given_batches[0])
    for (observes, rounds), x in zip(turns, given_batches[1:], strict=True):
        switch(ours, Switches(observe=observes, fake_quantize=rounds))
        theirs.enable_observer(observes)
        theirs.enable_fake_quant(rounds)
        assert_same_step(ours, theirs, x)


def test_nothing_is_rounded_before_anything_was_measured():
    x = torch.tensor([0.3, -1.7], requires_grad=True)
    for part in (module(FakeQuantize(MovingAverageMinMax())), module(FakeQuantize(Histogram()))):
        y = switch(part, Switches(observe=False))(x)
        assert y.tolist() == x.tolist()
        assert part.qparams() is None


def test_evaluation_rounds_and_does_not_measure():
    """In torch.ao it measures all the same, unless observers are off."""
    ours, x = module(FakeQuantize(MovingAverageMinMax())), torch.tensor([-1.0, 2.0])
    ours(x)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    found = ours.eval()(x * 5)
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    assert torch.equal(found, fake_quantize(x * 5, ours.scale, ours.zero_point, 0, 255))


# The fused operator ---------------------------------------------------------------------------------------------------


@given(
    settings(
        observers=("MovingAverageMinMaxObserver", "MovingAveragePerChannelMinMaxObserver"),
        name="FusedMovingAvgObsFakeQuantize",
    ),
    st.integers(0, 2**31),
)
def test_the_fused_operator(theirs, seed):
    """It trains with qparams of its own, and the observer's count afterwards."""
    ours, theirs = module(meaning(theirs)), made(theirs)
    assert ours.quantization.fused
    for x in batches(seed):
        assert_same_step(ours, theirs, x)
        assert_settled(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("seed", range(4))
def test_fused_ones_with_a_name(name, seed):
    ours, theirs = module(meaning(NAMED[name])), made(NAMED[name])
    for x in batches(seed):
        assert_same_step(ours, theirs, x)
        assert_settled(ours, theirs)


def assert_settled(ours: Any, theirs: Any) -> None:
    """What counts after training is what the observer gives."""
    scale, zero_point = theirs.calculate_qparams()
    assert torch.equal(ours.qparams().scale.reshape(-1), scale.reshape(-1))
    assert torch.equal(ours.qparams().zero_point.reshape(-1), zero_point.reshape(-1).long())


def test_unfused_it_rounds_in_training_as_it_does_afterwards():
    """The fused operator knows neither the least scale of its observer nor how many steps a symmetric range has."""
    theirs, x = NAMED["fused_wt_fake_quant_range_neg_127_to_127"], torch.tensor([1e-3, -1e-3])
    for fused in (True, False):
        ours = module(replace(meaning(theirs), fused=fused))
        ours(x)
        assert bool(ours.scale == ours.qparams().scale) is not fused
        assert ours.qparams().scale == 2.0**-12


# Learned qparams ------------------------------------------------------------------------------------------------------

LEARNED = (
    (UINT8, "MinMaxObserver", {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine}),
    (replace(UINT8, quant_max=15), "MovingAverageMinMaxObserver", {"dtype": torch.quint8}),
    (INT8_SYMMETRIC, "MinMaxObserver", {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}),
    (
        INT8_SYMMETRIC_PER_CHANNEL,
        "PerChannelMinMaxObserver",
        {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0},
    ),
    (
        QuantSpec("uint8", 0, 15, "per_channel_affine", 1),
        "MovingAveragePerChannelMinMaxObserver",
        {"dtype": torch.quint8, "qscheme": torch.per_channel_affine, "ch_axis": 1},
    ),
)
OBSERVERS = {
    "MinMaxObserver": MinMax,
    "MovingAverageMinMaxObserver": MovingAverageMinMax,
    "PerChannelMinMaxObserver": PerChannelMinMax,
    "MovingAveragePerChannelMinMaxObserver": MovingAveragePerChannelMinMax,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("spec", "observer", "options"), LEARNED, ids=lambda value: getattr(value, "qscheme", ""))
def test_measured_first_and_learned_then(spec, observer, options, scaled, seed):
    random = torch.Generator().manual_seed(seed)
    channels = None if spec.ch_axis is None else (6, 4)[spec.ch_axis]
    constructor = oracle_training.fake_quantizer(
        "_LearnableFakeQuantize",
        observer,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        use_grad_scaling=scaled,
        **({} if channels is None else {"channel_len": channels}),
        **options,
    )
    ours = module(FakeQuantize(OBSERVERS[observer](spec), learned=True, scale_gradient=scaled), channels)
    theirs = made(constructor)
    switch(ours, Switches(learn=False))
    theirs.enable_static_estimate()
    for _ in range(3):
        x = torch.randn(6, 4, 30, generator=random) + 0.3
        assert_same_step(ours, theirs, x)
    switch(ours, Switches(learn=True))
    theirs.enable_param_learning()
    # one gradient per channel is of as many values as there are in it; torch.ao divides by the root of all
    factor = math.sqrt(channels) if scaled and channels else 1.0
    names = ["scale"] if spec.symmetric else ["scale", "zero_point"]
    for _ in range(5):
        x = torch.randn(6, 4, 30, generator=random) * 1.5 + 0.3
        found = step(ours, x, {name: getattr(ours, name) for name in names})
        expected = step(theirs, x, {name: getattr(theirs, name) for name in names})
        expected |= {name: (expected[name] * factor).view(found[name].shape) for name in names}
        assert_close(found, expected)
        with torch.no_grad():
            for name in names:
                rate = 1e-3 if name == "scale" else 0.1
                value = getattr(theirs, name) - rate * torch.sign(expected[name]).view_as(getattr(theirs, name))
                getattr(theirs, name).copy_(value)
                getattr(ours, name).copy_(value.view_as(getattr(ours, name)))
        scale, zero_point = theirs.calculate_qparams()
        assert torch.equal(ours.qparams().scale.reshape(-1), scale.reshape(-1))
        assert torch.equal(ours.qparams().zero_point.reshape(-1), zero_point.reshape(-1))


def test_what_is_not_learned_has_no_gradient():
    """No optimizer moves it, whatever its weight decay."""
    part = switch(module(FakeQuantize(MinMax(), learned=True)), Switches(learn=False))
    x = torch.randn(50, requires_grad=True)
    part(x).square().sum().backward()
    assert part.scale.grad is None
    assert part.zero_point.grad is None
    switch(part, Switches(learn=True))(x * 1.1).square().sum().backward()
    assert part.scale.grad.abs() > 0


@pytest.mark.parametrize("low", [1e-9, 0.0, -0.2])
def test_a_scale_that_became_too_small_is_the_least_and_comes_back(low):
    part = module(FakeQuantize(MinMax(INT8_SYMMETRIC), learned=True))
    x = torch.linspace(-3, 3, 50)
    part(x)
    with torch.no_grad():
        part.scale.fill_(low)
    y = part(x)
    assert y.abs().max() <= 129 * INT8_SYMMETRIC.eps
    (y - x).square().sum().backward()
    assert part.scale.grad < 0  # so that a step makes it larger
    assert part.qparams().scale == INT8_SYMMETRIC.eps


# Batches that do not count --------------------------------------------------------------------------------------------

EVERY = (
    MinMax(),
    MovingAverageMinMax(),
    PerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 1)),
    MovingAveragePerChannelMinMax(QuantSpec("int8", -8, 7, "per_channel_symmetric", 1)),
    MovingAveragePerChannelMinMax(QuantSpec("uint8", 0, 15, FLOAT_QPARAMS, 1)),
    Histogram(bins=64),
    Percentile(bins=64),
    MeanSquaredError(bins=64),
    Entropy(bins=256, stride=16),
)
each_observer = pytest.mark.parametrize("observer", EVERY, ids=lambda each: type(each).__name__)


@each_observer
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("bad", "channels"), [(math.nan, None), (math.inf, 4), (-math.inf, None)])
def test_a_batch_with_nan_or_infinity_does_not_count(observer, learned, bad, channels):
    if learned and observer.spec.qscheme == FLOAT_QPARAMS:
        pytest.skip("zero points that are floats are not learned")
    first, second = batches(11, 2)
    spoilt = first.clone()
    spoilt[0, 1, 2] = bad
    part, sound = (module(FakeQuantize(observer, learned=learned), channels) for _ in range(2))
    found = part(spoilt)
    assert torch.equal(found, spoilt) or found.isnan().any() == math.isnan(bad)
    assert torch.equal(found.isnan(), spoilt.isnan())
    assert part.qparams() is None
    for x in (first, spoilt, second):
        part(x)
    for x in (first, second):
        sound(x)
    assert part.qparams() == sound.qparams()


@each_observer
@pytest.mark.parametrize("shape", [(0,), (0, 4, 7), (5, 4, 0)])
def test_an_empty_batch_does_not_count(observer, shape):
    if observer.spec.ch_axis is not None and len(shape) == 1:
        pytest.skip("it has no such axis")
    part, first = module(FakeQuantize(observer)), batches(12, 1)[0]
    empty = torch.zeros(shape, requires_grad=True)
    assert part(empty).shape == shape
    assert part.qparams() is None
    part(first)
    before = part.qparams()
    y = part(empty)
    assert y.shape == torch.autograd.grad(y.sum(), empty)[0].shape == shape
    assert part.qparams() == before


# Every observer, and the state ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """A user's own: the mean of the largest values of all batches; its state is a pair of plain numbers."""

    spec: QuantSpec = UINT8

    @property
    def statistic(self) -> str:
        return "peak"

    def init(self) -> tuple[float, int]:
        return 0.0, 0

    def update(self, state: tuple[float, int], tensor: Tensor) -> tuple[float, int]:
        return state[0] + tensor.abs().max().item(), state[1] + 1

    def finish(self, state: tuple[float, int]) -> QParams | None:
        return QParams(torch.tensor(state[0] / state[1] / 255), torch.tensor(0), self.spec) if state[1] else None


@pytest.mark.parametrize("observer", [*EVERY, Peak()], ids=lambda each: type(each).__name__)
def test_it_rounds_with_what_its_observer_finds(observer):
    part, state = module(FakeQuantize(observer)), observer.init()
    for x in batches(5):
        state = observer.update(state, x)
        qparams = observer.finish(state)
        found = step(part, x)
        spec = qparams.spec
        grid = (qparams.scale, qparams.zero_point, spec.quant_min, spec.quant_max, spec.ch_axis)
        assert torch.equal(found["y"], fake_quantize(x, *grid))
        assert part.qparams() == qparams
        assert set(found["x"].sign().abs().flatten().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "observer", [*EVERY, Peak(), FixedQParams(UINT8, 0.1, 3)], ids=lambda each: type(each).__name__
)
def test_training_goes_on_from_a_saved_state(observer, learned, tmp_path):
    if learned and observer.spec.qscheme == FLOAT_QPARAMS:
        pytest.skip("zero points that are floats are not learned")
    quantization, given_batches = FakeQuantize(observer, learned=learned), batches(6)
    part = module(quantization)
    for x in given_batches[:3]:
        part(x)
    switch(part, Switches(learn=False))
    torch.save(part.state_dict(), tmp_path / "state.pt")
    again = module(quantization)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.on == part.on
    assert again.qparams() == part.qparams()
    for x in given_batches[3:]:
        assert torch.equal(again(x), part(x))
        assert again.qparams() == part.qparams()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats(dtype):
    """Qparams stay float32 whatever the model is turned to, and torch.ao's are the same."""
    for name in ("default_fake_quant", "default_per_channel_weight_fake_quant", "default_embedding_fake_quant"):
        ours, theirs = module(meaning(NAMED[name])).to(dtype), made(NAMED[name])
        for x in batches(7, 3):
            found, expected = step(ours, x.to(dtype)), step(theirs, x.to(dtype).float())
            assert found["y"].dtype == found["x"].dtype == dtype
            axis = ours.spec.ch_axis
            clear = clear_of_halves(
                x, ours.scale, ours.zero_point, axis
            )  # in float32 the least and largest may be at one
            assert_close({"y": found["y"][clear]}, {"y": expected["y"].to(dtype)[clear]})
        assert ours.scale.dtype == torch.float32
        assert apart(ours.scale.reshape(-1), theirs.scale.reshape(-1)) < 1e-6


def test_each_batch_has_a_range_of_its_own_where_that_is_chosen_as_the_model_runs():
    ours, theirs = module(Dynamic(UINT8)), made(NAMED["default_dynamic_fake_quant"])
    for x in batches(8):
        assert_same_step(ours, theirs, x)
    x = torch.zeros(0, 3, requires_grad=True)
    assert ours(x).shape == (0, 3)
