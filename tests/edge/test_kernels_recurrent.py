"""Recurrent layers and cells against torch's: with exact products for the structure, with codes for the accuracy."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from qfunc import QConfigMapping, convert, lower, materialize, prepare, trace, unwrap
from qfunc import calibrate as calibrated
from qfunc.backends.default_mappings import DYNAMIC, FLOAT16_DYNAMIC
from qfunc.edge.host import check_host
from qfunc.edge.kernels import recurrent_int8
from qfunc.edge.kernels.recurrent_int8 import RecurrentCast, RecurrentDynamic
from qfunc.errors import StaleSource, problems
from qfunc.testing import oracle
from qfunc.testing.metrics import same_bits, sqnr

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

LAYERS = {
    "LSTM": lambda **options: nn.LSTM(6, 5, **options),
    "LSTM projected": lambda **options: nn.LSTM(6, 5, proj_size=3, **options),
    "GRU": lambda **options: nn.GRU(6, 5, **options),
    "RNN": lambda **options: nn.RNN(6, 5, **options),
    "RNN relu": lambda **options: nn.RNN(6, 5, nonlinearity="relu", **options),
}
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True, "batch_first": True},
    "three layers both ways, no bias": {"num_layers": 3, "bidirectional": True, "bias": False, "dropout": 0.5},
}
CELLS = {
    "LSTMCell": lambda: nn.LSTMCell(6, 5),
    "GRUCell": lambda: nn.GRUCell(6, 5, bias=False),
    "RNNCell": lambda: nn.RNNCell(6, 5),
    "RNNCell relu": lambda: nn.RNNCell(6, 5, nonlinearity="relu"),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_cell = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, state=None):
        return self.layer(x, state)


def stages(layer: nn.Module, mapping: QConfigMapping = DYNAMIC):
    """The reference form and the lowered stage, of a configuration that measures nothing."""
    graph = unwrap(trace(Holder(layer).eval()))
    converted = unwrap(calibrated(unwrap(prepare(graph, mapping)), []).bind(convert))
    return converted, unwrap(lower(converted, strict=True))


def kernel_of(layer: nn.Module, mapping: QConfigMapping = DYNAMIC):
    _, lowered = stages(layer, mapping)
    return unwrap(materialize(lowered)).get_submodule("layer")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels whose products are exact: all but the rounding of what is multiplied."""
    check_host()  # which is asked once a process, of the kernels as they are

    def pack(codes, scale, bias):
        return codes * scale[:, None], scale, bias

    monkeypatch.setattr(recurrent_int8, "pack", pack)
    monkeypatch.setattr(recurrent_int8, "own_codes", lambda x, _: x)
    monkeypatch.setattr(recurrent_int8, "product", lambda x, packed: F.linear(x, packed[0], packed[2]))


def rounded(layer: nn.Module, kernel: RecurrentDynamic) -> nn.Module:
    """torch's layer with the weights that the kernel's stand for."""
    twin = copy.deepcopy(layer).eval()
    for name, value in kernel.state_dict().items():
        if name.startswith("weight") and not name.endswith("scale"):
            codes, scale = value, kernel.state_dict()[f"{name}_scale"]
            twin.get_parameter(name).data = codes * scale[:, None]
    return twin


def close(got, expected, bound=1e-5):
    got, expected = ((v.data if isinstance(v, PackedSequence) else v) for v in (got, expected))
    if isinstance(expected, tuple):
        assert isinstance(got, tuple)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            close(a, b, bound)
        return
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=bound)


def states_of(layer, batch):
    """Random initial states; `batch` is None for input without a batch."""
    width = layer.num_layers * (1 + layer.bidirectional)
    middle = () if batch is None else (batch,)
    hidden = torch.randn(width, *middle, layer.proj_size or layer.hidden_size)
    return (hidden, torch.randn(width, *middle, layer.hidden_size)) if isinstance(layer, nn.LSTM) else hidden


@pytest.mark.usefixtures("exact")
@torch.no_grad()
@each_layer
@each_options
def test_with_exact_products_a_layer_is_torchs(make, options):
    torch.manual_seed(0)
    layer = make(**options).eval()
    kernel = kernel_of(layer)
    assert isinstance(kernel, RecurrentDynamic)
    twin = rounded(layer, kernel)
    for shape in ((4, 3, 6), (1, 2, 6), (3, 1, 6), (4, 6)):
        x = torch.randn(shape)
        batch = None if len(shape) == 2 else shape[0] if layer.batch_first else shape[1]
        for state in (None, states_of(layer, batch)):
            close(kernel(x, state), twin(x, state))
    sequences = [torch.randn(steps, 6) for steps in (2, 5, 1, 5)]
    for packed in (pack_sequence(sequences, enforce_sorted=False), pack_sequence([sequences[1]])):
        batch = int(packed.batch_sizes[0])
        for state in (None, states_of(layer, batch)):
            got, expected = kernel(packed, state), twin(packed, state)
            close(got, expected)
            assert torch.equal(got[0].batch_sizes, expected[0].batch_sizes)


@pytest.mark.usefixtures("exact")
@torch.no_grad()
@each_cell
def test_with_exact_products_a_cell_is_torchs(make):
    torch.manual_seed(0)
    cell = make().eval()
    kernel = kernel_of(cell)
    twin = rounded(cell, kernel)
    for shape in ((3, 6), (6,), (0, 6)):
        x = torch.randn(shape)
        hidden = torch.randn(*shape[:-1], 5)
        state = (hidden, torch.randn_like(hidden)) if isinstance(cell, nn.LSTMCell) else hidden
        close(kernel(x), twin(x))
        close(kernel(x, state), twin(x, state))


@torch.no_grad()
@each_layer
@each_options
def test_with_codes_a_layer_is_near_the_float_one_and_the_reference_form(make, options):
    torch.manual_seed(1)
    layer = make(**options).eval()
    converted, lowered = stages(layer)
    reference, kernel = unwrap(materialize(converted)), unwrap(materialize(lowered))
    x = torch.randn(7, 4, 6)
    assert sqnr(layer(x), kernel(x)) > 30
    assert sqnr(reference(x), kernel(x)) > 35
    state = kernel.state_dict()
    codes = {name for name, value in state.items() if value.dtype is torch.int8}
    assert codes == {f"layer.{name}" for name in dict(layer.named_parameters()) if name.startswith("weight")}
    assert all(state[f"{name}_scale"].dtype is torch.float32 for name in codes)


@torch.no_grad()
@pytest.mark.parametrize("mapping", [DYNAMIC, FLOAT16_DYNAMIC], ids=["int8", "float16"])
def test_layers_copy_pickle_compile_and_ignore_half(mapping):
    torch.manual_seed(2)
    kernel = kernel_of(nn.LSTM(6, 5, num_layers=2), mapping)
    x = torch.randn(3, 2, 6)
    expected = kernel(x)
    for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel).half()):
        assert same_bits(other(x), expected)
    assert same_bits(torch.compile(kernel, backend="eager")(x), expected)


@torch.no_grad()
@each_layer
@each_options
def test_float16_layers_are_the_reference_form_bit_for_bit(make, options):
    torch.manual_seed(3)
    layer = make(**options).eval()
    converted, lowered = stages(layer, FLOAT16_DYNAMIC)
    reference, module = unwrap(materialize(converted)), unwrap(materialize(lowered))
    kernel = module.get_submodule("layer")
    assert isinstance(kernel, RecurrentCast)
    assert all(v.dtype is torch.float16 for n, v in kernel.state_dict().items() if n.startswith("weight"))
    for shape, given in itertools.product(((4, 3, 6), (4, 6)), (False, True)):
        x = torch.randn(shape)
        batch = None if len(shape) == 2 else shape[0] if layer.batch_first else shape[1]
        state = states_of(layer, batch) if given else None
        close(module(x, state), reference(x, state), 1e-6)
    packed = pack_padded_sequence(torch.randn(3, 2, 6), torch.tensor([3, 1]))
    data = packed.data.half().float()
    close(kernel(packed), unwrap_layer(reference)(packed._replace(data=data)), 1e-6)


def unwrap_layer(module: nn.Module) -> nn.Module:
    return module.get_submodule("layer")


@torch.no_grad()
@each_cell
def test_float16_cells_are_the_reference_form(make):
    torch.manual_seed(3)
    converted, lowered = stages(make().eval(), FLOAT16_DYNAMIC)
    x = torch.randn(3, 6)
    close(unwrap(materialize(lowered))(x), unwrap(materialize(converted))(x), 1e-6)


class Named(Holder):
    """Called with keywords, in an order that is not the layer's."""

    def forward(self, x, state=None):
        return self.layer(hx=state, input=x)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize("mapping", [DYNAMIC, FLOAT16_DYNAMIC], ids=["int8", "float16"])
@pytest.mark.parametrize("make", (LAYERS | CELLS).values(), ids=LAYERS | CELLS)
def test_a_layer_may_be_called_by_keywords(make, mapping, engine):
    torch.manual_seed(5)
    layer = make().eval()
    x = torch.randn(3, 6) if "Cell" in type(layer).__name__ else torch.randn(4, 3, 6)
    made = []
    for holder in (Holder(layer), Named(layer)):
        prepared = unwrap(prepare(unwrap(trace(holder.eval(), x)), mapping))
        lowered = unwrap(calibrated(prepared, []).bind(convert).bind(lambda c: lower(c, engine=engine, strict=True)))
        made.append((lowered, unwrap(materialize(lowered))))
    (first, one), (second, other) = made
    close(other(x), one(x), 0.0)
    assert [(e.kernel, e.multiply_adds) for e in first.certificate.entries if e.intended] == [
        (e.kernel, e.multiply_adds) for e in second.certificate.entries if e.intended
    ]
    assert second.certificate.multiply_adds


@pytest.mark.parametrize("mapping", [DYNAMIC, FLOAT16_DYNAMIC], ids=["int8", "float16"])
@pytest.mark.parametrize("make", [LAYERS["GRU"], CELLS["LSTMCell"]], ids=["layer", "cell"])
def test_a_bias_that_changed_since_is_told(make, mapping):
    layer = make().eval()
    for stage in stages(layer, mapping):
        unwrap(materialize(stage))
    stale = stages(layer, mapping)
    name = next(name for name, _ in layer.named_parameters() if name.startswith("bias_hh"))
    with torch.no_grad():
        layer.get_parameter(name).add_(1.0)
    for stage in stale:
        assert problems(materialize(stage).failure()) == (StaleSource(f"layer.{name}"),)


def test_impossible_calls_are_told():
    kernel = kernel_of(nn.GRU(6, 5))
    for x, state, message in (
        (torch.randn(3, 2, 7), None, "6 features is given 7"),
        (torch.randn(3, 2, 6), torch.randn(1, 2, 4), "states of shape"),
        (torch.randn(0, 2, 6), None, "no steps"),
        (torch.randn(6), None, "axes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(x, state)
    x = torch.randn(3, 0, 6)
    close(kernel(x), nn.GRU(6, 5)(x))


@pytest.mark.skipif(not oracle.available(), reason="the reference is not installed")
@torch.no_grad()
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
def test_layers_are_at_least_as_near_to_float_as_the_references(name):
    """Both find a range for the whole sequence and for the state at each step; torch's take 7 bits of it, these 8."""
    torch.manual_seed(4)
    is_cell = name.endswith("Cell")
    layer = getattr(nn, name)(24, 32, **({} if is_cell else {"num_layers": 2})).eval()
    x = torch.randn(9, 24) if is_cell else torch.randn(12, 9, 24)
    theirs = oracle.quantize_dynamically(layer)
    ours = kernel_of(layer)
    expected = layer(x)
    assert sqnr(expected, ours(x)) >= sqnr(expected, theirs(x))
