"""A lowered module is an ordinary module: it copies, pickles, saves, loads, compiles and runs at other sizes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import qfunc
from qfunc.testing.metrics import same_bits
from tests.zoo import ZOO

ENGINES = ("onednn", "quantized", "reference")


class Residual(nn.Module):
    """A convolution whose sum reads its own input, which nobody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        return self.head(torch.flatten(self.pool(x), 1))


@pytest.fixture(scope="module", params=ENGINES)
def lowered(request: pytest.FixtureRequest) -> qfunc.Lowered:
    torch.manual_seed(0)
    model = Residual().eval()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(2)]
    return qfunc.unwrap(qfunc.quantize(model, batches, engine=request.param))


@pytest.fixture(scope="module")
def module(lowered: qfunc.Lowered) -> fx.GraphModule:
    return qfunc.unwrap(qfunc.materialize(lowered))


@pytest.fixture(scope="module")
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 12, 12)


@torch.no_grad()
def test_copies_and_pickles(module: fx.GraphModule, x: Tensor) -> None:
    expected = module(x)
    assert same_bits(copy.deepcopy(module)(x), expected)
    assert same_bits(pickle.loads(pickle.dumps(module))(x), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert same_bits(torch.load(buffer, weights_only=False)(x), expected)


@torch.no_grad()
def test_state_dict_holds_plain_integers_and_loads(lowered: qfunc.Lowered, module: fx.GraphModule, x: Tensor) -> None:
    expected = module(x)
    state = module.state_dict()
    if lowered.engine != "reference":
        assert state["body.weight"].dtype is torch.int8
        assert state["body.weight_scale"].dtype is torch.float32
        assert not any(tensor.is_quantized or tensor.is_mkldnn for tensor in state.values())
    other = qfunc.unwrap(qfunc.materialize(lowered))
    other(x)  # packs the weights, which loading has to drop
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert same_bits(other(x), expected)


@torch.no_grad()
def test_loads_in_another_process(module: fx.GraphModule, x: Tensor, tmp_path: Path) -> None:
    torch.save({"module": module, "x": x, "y": module(x)}, tmp_path / "saved.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): assert torch.equal(saved['module'](saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "saved.pt")], check=True)


@torch.no_grad()
def test_half_does_not_touch_scales(lowered: qfunc.Lowered, module: fx.GraphModule, x: Tensor) -> None:
    if lowered.engine == "reference":
        pytest.skip("the reference form computes in the dtype of its float weights")
    assert same_bits(copy.deepcopy(module).half()(x), module(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (5, 3, 12, 12), (2, 3, 17, 9), (2, 3, 32, 32)])
def test_other_batch_and_image_sizes(lowered: qfunc.Lowered, module: fx.GraphModule, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = torch.randn(shape)
    source = lowered.graph.sources["model"].model
    expected, actual = source(x), module(x)
    assert actual.shape == expected.shape
    assert qfunc.testing.metrics.sqnr(expected, actual) > 15


@torch.no_grad()
def test_an_input_that_the_sum_reads_too_is_not_overwritten(lowered: qfunc.Lowered, module: fx.GraphModule) -> None:
    torch.manual_seed(3)
    x = torch.randn(8, 3, 40, 40)
    source = lowered.graph.sources["model"].model
    assert qfunc.testing.metrics.sqnr(source(x), module(x)) > 20
    assert same_bits(module(x), module(x))


@torch.no_grad()
def test_threads_share_one_module(module: fx.GraphModule) -> None:
    torch.manual_seed(4)
    inputs = [torch.randn(2, 3, 8 + 2 * i, 10) for i in range(6)]
    expected = [module(x) for x in inputs]
    fresh = copy.deepcopy(module)
    results: list[Tensor | None] = [None] * len(inputs)

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[index] = fresh(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits(results, expected)


@torch.no_grad()
def test_compiles(module: fx.GraphModule, x: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-6)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")  # of fx.GraphModule's own __init__
def test_the_quantized_engine_scripts(lowered: qfunc.Lowered, module: fx.GraphModule, x: Tensor) -> None:
    if lowered.engine != "quantized":
        pytest.skip("only the quantized engine promises TorchScript")
    assert same_bits(torch.jit.script(module)(x), module(x))


@torch.no_grad()
def test_values_between_kernels_are_channels_last() -> None:
    case = next(case for case in ZOO if case.name == "resnet")
    model, example = case.build()
    lowered = qfunc.unwrap(qfunc.quantize(model, [example]))
    module = qfunc.unwrap(qfunc.materialize(lowered))
    seen: list[str] = []

    class Watch(fx.Interpreter):
        def call_module(self, target: str, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
            value = super().call_module(target, args, kwargs)
            between = isinstance(value, Tensor) and args[0].dtype is value.dtype is torch.uint8 and value.dim() == 4
            if between and not value.is_contiguous(memory_format=torch.channels_last):
                seen.append(target)
            return value

    Watch(module).run(*example)
    assert seen == []
