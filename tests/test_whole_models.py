"""Odd but plausible models through `quantize`: near the float model, or a reason in the certificate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from returns.result import Failure
from torch import Tensor, nn

from qfunc import CPU, materialize, prepare, quantize, render, trace, unwrap
from qfunc.config.backend_config import Observation, OperatorConfig
from qfunc.testing import sqnr


class Two(nn.Module):
    """Two convolutions, and a function of them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class TwoInputs(Two):
    """The same, of two inputs."""

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.d(self.c(x) + r)


def ends_in_a_sum(m, x):
    y = m.c(x)
    return F.relu(y + m.d(y))


def clamp_by_a_tensor(m, x):
    y = m.c(x)
    return m.d(torch.clamp(y, min=y.mean()))


def average_with_own_divisor(m, x):
    return m.d(F.avg_pool2d(m.c(x), 3, 2, 1, divisor_override=2))


def clamp_without_zero(m, x):
    return m.d(F.hardtanh(m.c(x), 0.2, 0.6))


def sum_with_alpha(m, x):
    y = m.c(x)
    return m.d(torch.add(y, m.d(y), alpha=2))


MODELS = (ends_in_a_sum, clamp_by_a_tensor, average_with_own_divisor, clamp_without_zero, sum_with_alpha)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize("function", MODELS, ids=lambda function: function.__name__)
def test_is_near_the_float_model_with_both_convolutions_on_integers(function, engine):
    torch.manual_seed(0)
    model, x = Two(function).eval(), torch.randn(2, 3, 8, 8)
    lowered = unwrap(quantize(model, [x], engine=engine))
    kernels = [entry.kernel for entry in lowered.certificate.entries if entry.operator.startswith("conv2d")]
    assert all(kernels)
    assert sqnr(model(x), unwrap(materialize(lowered))(x)) > 28


@torch.no_grad()
def test_a_sum_broadcasts_the_batch_of_either_operand():
    torch.manual_seed(0)
    model = TwoInputs(lambda *_: None).eval()
    x, r = torch.randn(4, 3, 8, 8), torch.randn(4, 8, 8, 8)
    module = unwrap(materialize(unwrap(quantize(model, [(x[:1], r[:1])]))))
    for left, right in ((x[:1], r), (x, r[:1]), (x, r)):
        assert sqnr(model(left, right), module(left, right)) > 20


@pytest.mark.parametrize("place", ["input", "slice"])
def test_strict_tells_layers_kept_float_by_in_place_writes(place):
    def function(m, x):
        if place == "input":
            return m.c(F.relu(x, inplace=True))
        y = m.c(x)
        y[:, 0] = 0
        return m.d(y)

    failure = quantize(Two(function).eval(), [torch.randn(2, 3, 8, 8)], strict=True).failure()
    assert "its memory is changed in place" in render(failure)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Conv2d(4, 4, 1), True),
        (nn.ConvTranspose2d(4, 4, 2), True),
        (nn.Linear(8, 8), True),
        (nn.BatchNorm2d(4), False),
        (nn.PReLU(4), False),
        (nn.GELU(), False),
    ],
    ids=lambda given: str(given).split("(")[0],
)
def test_strict_tells_layers_that_the_backend_has_no_rule_for(layer, told):
    ruleless = replace(CPU, operators=(), fusions=())
    result = quantize(nn.Sequential(layer).eval(), [torch.randn(2, 4, 8, 8)], backend=ruleless, strict=True)
    assert isinstance(result, Failure) == told
    assert not told or "the cpu backend has no rule for it" in render(result.failure())


def test_the_weight_of_a_prelu_is_not_quantized():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 4, 1)).eval()
    listed = replace(CPU, operators=(*CPU.operators, OperatorConfig(("prelu",), Observation.OWN)))
    for backend in (CPU, listed):
        prepared = unwrap(prepare(unwrap(trace(model)), backend=backend))
        assert set(prepared.weights) == {"_0", "_2"}
        assert not prepared.refused


def test_weights_without_data_are_a_failure():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")).eval()
    assert "meta" in render(quantize(model, [torch.randn(1, 3, 8, 8)]).failure())


@pytest.mark.parametrize("batch", [None, (torch.randn(1, 3, 8, 8), 1)], ids=["None", "with labels"])
def test_batches_that_do_not_fit_say_how_to_make_them_fit(batch):
    failure = quantize(Two(ends_in_a_sum).eval(), [batch]).failure()
    assert "pass the inputs only" in render(failure)


class Between(nn.Module):
    """A function between two layers of 8 features."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)
        self.norm = nn.LayerNorm(6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.norm(self.a(x))))


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.max(x, 2)[0],
        lambda x: torch.max(x, 2, keepdim=True)[0].expand(-1, -1, 6),
        lambda x: torch.topk(x, 3, dim=2)[0],
        lambda x: torch.sort(x, dim=2)[0][..., :4],
        lambda x: torch.var_mean(x, 2)[1],
    ],
    ids=["max", "max with keepdim", "topk", "sort", "var_mean"],
)
def test_the_part_of_a_tuple_that_runs_in_float_is_no_move_of_codes(function, engine):
    torch.manual_seed(0)
    model, x = Between(lambda x: F.relu(function(x)).reshape(2, 8, -1)).eval(), torch.randn(2, 8, 6)
    module = unwrap(materialize(unwrap(quantize(model, [x], engine=engine))))
    assert sqnr(model(x), module(x)) > 25


def test_asking_for_a_size_costs_no_conversion():
    def asks(x):
        rows, channels, length = x.shape
        return x.view(rows, channels, length)

    x = torch.randn(2, 8, 6)
    asked, plain = (
        unwrap(quantize(Between(function).eval(), [x])).certificate for function in (asks, lambda x: x.view(2, 8, 6))
    )
    assert plain.conversions == 1
    assert asked.conversions == plain.conversions, asked


@torch.no_grad()
@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_padding_to_a_size_that_another_value_has_is_done_on_codes(mode):
    def joined(m, x):
        skip = m.c(x)
        deep = F.max_pool2d(skip, 2).repeat(1, 1, 2, 2)
        high, wide = skip.size(2) - deep.size(2), skip.size(3) - deep.size(3)
        return m.d(F.pad(deep, [wide // 2, wide - wide // 2, high // 2, high - high // 2], mode=mode) + skip)

    torch.manual_seed(0)
    model = Two(joined).eval()
    lowered = unwrap(quantize(model, [torch.randn(2, 3, 9, 8)]))
    (entry,) = (entry for entry in lowered.certificate.entries if entry.operator == "pad")
    assert (entry.kernel, lowered.certificate.conversions) == ("codes.pad", 1)
    module = unwrap(materialize(lowered))
    for size in ((9, 8), (8, 8), (11, 13)):
        x = torch.randn(1, 3, *size)
        assert sqnr(model(x), module(x)) > 20


@torch.no_grad()
def test_a_float_island_looks_its_operator_up_once(monkeypatch):
    x = torch.randn(2, 8, 6)
    lowered = unwrap(quantize(Between(nn.GELU()).eval(), [x]))
    assert "float island" in {entry.kernel for entry in lowered.certificate.entries}
    module = unwrap(materialize(lowered))
    expected = module(x)

    def none(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", none)
    assert torch.equal(module(x), expected)


class Parts(nn.Module):
    """Lists of parts of a tensor, as detectors have them, and a residual that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.append(self.inner(parts[-1]))
        doubled = [part * 2 for part in torch.split(x, split_size_or_sections=[1, 3], dim=1)]
        unread = self.inner(x) + x  # noqa: F841
        return self.last(torch.cat(parts, 1)) + doubled[0]


@pytest.mark.parametrize("engine", ["onednn", "quantized", "reference"])
def test_lists_of_parts_are_traced_and_what_nobody_reads_is_not_computed(engine):
    torch.manual_seed(0)
    model, data = Parts().eval(), torch.randn(2, 4, 6, 6)
    lowered = unwrap(quantize(model, [data], engine=engine, strict=engine != "reference"))
    assert sqnr(model(data), unwrap(materialize(lowered))(data)) > 25
    unread = [note.node for note in lowered.certificate.notes if "nobody reads" in note.text]
    assert {"add", "getitem_3", "mul_1"} <= set(unread)  # the convolution, where it is not fused with the sum
    assert set(unread).isdisjoint(lowered.graph.nodes)


def test_an_unknown_number_of_parts_is_untraceable():
    class Unknown(nn.Module):
        def forward(self, x):
            return len(list(x.split(2, 1)))

    assert "length is unknown" in trace(Unknown()).failure().reason


def test_an_embedding_is_not_meant_by_the_default_configuration():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4)).eval()
    (entry, _) = unwrap(quantize(model, [torch.tensor([[1, 2]])], strict=True)).certificate.entries
    assert "FLOAT_QPARAMS_WEIGHT_ONLY" in entry.reason


def test_islands_between_quantized_tensors_can_be_scripted():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.LayerNorm(8), nn.Softmax(1), nn.Conv1d(4, 4, 1)).eval()
    data = torch.randn(2, 4, 8)
    module = unwrap(materialize(unwrap(quantize(model, [data], engine="quantized", strict=True))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        scripted = torch.jit.script(module)
    torch.testing.assert_close(scripted(data), module(data), rtol=0, atol=0)
