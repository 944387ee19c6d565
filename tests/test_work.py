"""Multiply-adds and bytes of the certificate, against torch's counter of operations and the materialized modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qfunc import check_host, materialize, params, quantize, trace, unwrap
from qfunc.ir import Expression, Token
from qfunc.numerics.observers import PerChannelMinMax
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.passes.work import dtype_of, multiply_adds, shape_of


def counted(model: nn.Module, *inputs: Tensor) -> int | None:
    """What qfunc counts from the shapes of the example."""
    graph = unwrap(trace(nn.Sequential(model).eval() if len(inputs) == 1 else model.eval(), inputs))
    counts = [multiply_adds(node, graph) for node in graph]
    return None if None in counts else sum(count or 0 for count in counts)


def run(model: nn.Module, *inputs: Tensor) -> int:
    """What torch counts when it runs: two operations for a multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 8, (3, 2), padding=1, dilation=2), (2, 3, 9, 8)),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8), (1, 8, 5, 6)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "linear": (nn.Linear(7, 5), (2, 3, 7)),
    "no multiply-adds": (nn.Sequential(nn.MaxPool2d(2), nn.GELU(), nn.BatchNorm2d(3)), (2, 3, 4, 4)),
    "folded": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
               (2, 3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_count_what_torch_counts(name: str) -> None:
    layer, shape = LAYERS[name]
    assert counted(layer, torch.randn(shape)) == run(layer, torch.randn(shape))


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "matmul": (torch.matmul, (2, 3, 4, 5), (2, 3, 5, 6)),
    "broadcast": (torch.matmul, (2, 3, 4, 5), (5, 6)),
    "operator": (lambda x, y: x @ y, (4, 5), (5, 6)),
    "vectors": (lambda x, y: x @ y, (4, 5), (5,)),
    "bmm": (torch.bmm, (2, 4, 5), (2, 5, 3)),
    "mm": (torch.mm, (4, 5), (5, 3)),
    "einsum": (lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), (2, 3, 4, 5), (2, 3, 6, 5)),
    "attention": (lambda x, y: F.scaled_dot_product_attention(x, y, y), (2, 3, 4, 8), (2, 3, 7, 8)),
    "sum": (torch.add, (2, 3), (2, 3)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_count_what_torch_counts(name: str) -> None:
    function, first, second = PRODUCTS[name]
    model, inputs = Function(function), (torch.randn(first), torch.randn(second))
    expected = run(model, *inputs)
    assert counted(model, *inputs) == (4 * 5 if name == "vectors" else expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_count_each_matrix_at_each_step(kind: type[nn.LSTM], batch_first: bool) -> None:
    layer = kind(4, 5, num_layers=2, bidirectional=True, batch_first=batch_first)
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)[0]

    assert counted(First(), torch.randn(3, 7, 4)) == matrices * 21


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_counts_its_projections_and_its_scores(batch_first: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=6, vdim=4)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return self.layer(q, k, v)[0]

    batch, length, others = 3, 5, 7
    shapes = [(batch, length, 8), (batch, others, 6), (batch, others, 4)]
    inputs = [torch.randn(s if batch_first else (s[1], s[0], s[2])) for s in shapes]
    projections = batch * (length * 8 * 8 * 2 + others * 8 * (6 + 4))
    assert counted(Attend(), *inputs) == projections + 2 * batch * length * others * 8


def test_an_unknown_layer_is_not_counted_and_a_lookup_counts_nothing() -> None:
    assert counted(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.tensor([[1, 2, 3]])) == 3 * 4 * 2
    assert counted(nn.TransformerEncoderLayer(4, 2, batch_first=True), torch.randn(2, 3, 4)) is None
    assert counted(nn.Softmax(1), torch.randn(2, 3)) == 0
    assert counted(Function(lambda x, y: torch.mm(input=x, mat2=y)), torch.randn(2, 3), torch.randn(3, 4)) is None
    assert (
        counted(Function(lambda x, y: torch.einsum("...i,ij->...j", x, y)), torch.ones(2, 3), torch.ones(3, 4)) is None
    )
    assert counted(Function(lambda x, y: torch.tensordot(x, y, 1)), torch.randn(2, 3), torch.randn(3, 4)) is None


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "linear", "folded"])
def test_bytes_are_those_of_the_modules(name: str) -> None:
    layer, shape = LAYERS[name]
    lowered = unwrap(quantize(nn.Sequential(layer).eval(), [torch.randn(shape)], host=check_host()))
    state = unwrap(materialize(lowered)).state_dict()
    assert lowered.certificate.weight_bytes == sum(t.numel() * t.element_size() for t in state.values())
    folded = sum(t.numel() for t in state.values() if t.dtype == torch.int8)
    biases = sum(t.numel() for name, t in state.items() if name.endswith("bias"))
    assert lowered.certificate.float_weight_bytes == 4 * (folded + biases)


W = params.Load("w", "float32", (4, 3, 2))
B = params.Load("b", "float32", (4,))
QW = params.QuantizeWeight(W, PerChannelMinMax(INT8_NARROW_PER_CHANNEL))
EXPRESSIONS: dict[type, tuple[Expression, tuple[int, ...], str]] = {
    params.Load: (W, (4, 3, 2), "float32"),
    params.FoldBatchNorm: (params.FoldBatchNorm("bias", W, None, B, B, None, None, 1e-5), (4,), "float32"),
    params.QuantizeWeight: (QW, (4, 3, 2), "int8"),
    params.FakeQuantizeWeight: (params.FakeQuantizeWeight(W, Token("t")), (4, 3, 2), "float32"),
    params.DequantizeWeight: (params.DequantizeWeight(QW), (4, 3, 2), "float32"),
    params.CastWeight: (params.CastWeight(W, "float16"), (4, 3, 2), "float32"),
    params.WeightCodes: (params.WeightCodes(QW), (4, 3, 2), "int8"),
    params.QParamsPart: (params.QParamsPart("scale", QW), (4,), "float32"),
    params.Constant: (params.Constant((1.0, 2.0), (2, 1)), (2, 1), "float32"),
    params.DivideColumns: (params.DivideColumns(W, (1.0,) * 3), (4, 3, 2), "float32"),
    params.MultiplyRows: (params.MultiplyRows(B, (1.0,) * 4), (4,), "float32"),
}


def test_every_parameter_expression_has_a_shape_and_a_dtype() -> None:
    """But for derived qparams, which are no parameters."""
    found = {cls for cls in vars(params).values() if isinstance(cls, type) and issubclass(cls, Expression)}
    assert found - {Expression, params.DeriveQParams} == set(EXPRESSIONS)
    for expression, shape, dtype in EXPRESSIONS.values():
        assert (shape_of(expression), dtype_of(expression)) == (shape, dtype)


def test_weights_that_are_shared_count_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    lowered = unwrap(quantize(Twice().eval(), [torch.randn(2, 6)], engine="reference"))
    assert lowered.certificate.float_weight_bytes == 4 * (36 + 6)
