"""Codes that use a part of their dtype, as those of four bits do: kernels clamp to what the ends stand for."""

import pytest
import torch
from torch import nn

from qfunc import (
    X86,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    absorb,
    calibrate,
    convert,
    for_training,
    fuse,
    interpret,
    lower,
    materialize,
    prepare,
    prepare_qat,
    trace,
    unwrap,
)
from qfunc.testing.kernel_law import kernels_off

WEIGHT = PerChannelMinMax(QuantSpec("int8", -7, 7, "per_channel_symmetric", 0))


class Net(nn.Module):
    def __init__(self, rank):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first, self.second = conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1)
        self.third, self.fourth, self.head = conv(8, 8, 1), conv(8, 8, 1), nn.Linear(8, 8)
        self.tail, self.axes = nn.Linear(8, 4), tuple(range(2, rank + 2))

    def forward(self, x):
        y = torch.relu(self.first(x))
        y = (self.second(y) + y).relu()
        y = nn.functional.hardtanh(self.fourth(self.third(y)), -0.3, 0.4)
        return self.tail(torch.relu(self.head(y.mean(self.axes))))


@pytest.mark.parametrize("largest", [7, 15, 31, 200])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_run_on_integers_and_give_no_code_beyond_the_range(rank, largest):
    torch.manual_seed(rank)
    model = Net(rank).eval()
    batches = [torch.randn(4, 3, *[9] * rank) for _ in range(2)]
    mapping = QConfigMapping().set_global(QConfig(MinMax(QuantSpec("uint8", 0, largest)), WEIGHT))
    graph = unwrap(trace(model, batches[0]).bind(fuse))
    converted = unwrap(prepare(graph, mapping).bind(lambda made: calibrate(made, batches[:1])).bind(convert))
    lowered = unwrap(lower(converted))
    layers = [entry for entry in lowered.certificate.entries if entry.operator.startswith(("conv", "linear"))]
    assert all(entry.kernel.startswith("onednn.") for entry in layers), str(lowered.certificate)
    beyond = 30 * batches[1]  # far more than was measured
    assert [off for off in kernels_off(converted, lowered, [(beyond,)]) if off] == []
    found = {}
    unwrap(interpret(lowered, beyond, lambda id, value: found.setdefault(id, value)))
    codes = [value for value in found.values() if isinstance(value, torch.Tensor) and value.dtype == torch.uint8]
    assert max(int(value.max()) for value in codes) == largest


@pytest.mark.filterwarnings(
    "ignore:.*quantized tensor creation.*:UserWarning",
    "ignore:`torch.jit.script:DeprecationWarning",
    "ignore:The TorchScript type system:UserWarning",
)
@pytest.mark.parametrize("largest", [15, 127])
def test_quantized_tensors_are_clamped_behind_their_kernels(largest):
    torch.manual_seed(0)
    model = Net(2).eval()
    batches = [torch.randn(4, 3, 9, 9) for _ in range(2)]
    mapping = for_training(QConfigMapping().set_global(QConfig(MinMax(QuantSpec("uint8", 0, largest)), WEIGHT)))
    prepared = unwrap(
        trace(model.train(), batches[0])
        .bind(lambda graph: fuse(graph, qat=True, backend=X86))
        .bind(lambda graph: prepare_qat(graph, mapping, backend=X86))
    )
    module = unwrap(materialize(prepared))
    module(batches[0])
    converted = unwrap(absorb(prepared, module).bind(convert))
    lowered = unwrap(lower(converted, engine="quantized"))
    assert lowered.certificate.in_int8 >= 6, str(lowered.certificate)
    beyond = 30 * batches[1]
    assert [off for off in kernels_off(converted, lowered, [(beyond,)]) if off] == []
    made = unwrap(materialize(lowered))
    scripted = torch.jit.script(made)
    with torch.no_grad():
        evaluated, found = module.eval()(beyond), made(beyond)
    assert torch.equal(scripted(beyond), found)
    assert (evaluated - found).abs().max() < 0.1 * evaluated.abs().max()
    codes = {}
    unwrap(interpret(lowered, beyond, lambda id, value: codes.setdefault(id, value)))
    tensors = [value for value in codes.values() if isinstance(value, torch.Tensor) and value.is_quantized]
    assert max(int(value.int_repr().max()) for value in tensors) == largest
