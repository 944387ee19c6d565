"""Configurations that measure nothing: every layer of the CPU backend gets a kernel, without calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import qfunc
from qfunc import (
    QConfig,
    QConfigMapping,
    calibrate,
    check_host,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    quantize,
    read_certificate,
    to_json,
    trace,
    unwrap,
)
from qfunc.backends import default_mappings as mappings
from qfunc.backends import qconfigs
from qfunc.errors import NoBatches
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8, INT8_NARROW_PER_CHANNEL, INT8_SYMMETRIC, QuantSpec
from qfunc.numerics.unmeasured import Dynamic, KeepFloat
from qfunc.testing.kernel_law import kernels_off
from qfunc.testing.metrics import same_bits, sqnr

WEIGHTS = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)


def of_all(qconfig: QConfig) -> QConfigMapping:
    return QConfigMapping().set_global(qconfig)


class Call(nn.Module):
    """A layer that is called with all that its caller gives."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        return self.layer(*inputs)


class One(Call):
    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Two(Call):
    def forward(self, x: Any, y: Any) -> Any:
        return self.layer(x, y)


class Bags(Call):
    def forward(self, x: Any, offsets: Any, weights: Any) -> Any:
        return self.layer(x, offsets, per_sample_weights=weights)


class Functions(nn.Module):
    """Tables and matrices that are parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 8))
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, index: Tensor) -> Tensor:
        rows = F.embedding(index, self.table)
        bag = F.embedding_bag(index, self.table, mode="max")
        return F.linear(rows.sum(1) + bag, self.weight)


def index(*shape: int) -> Tensor:
    return torch.randint(0, 10, shape, generator=torch.Generator().manual_seed(0))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


Make = Callable[[], tuple[nn.Module, tuple[Any, ...]]]

LINEARS: dict[str, Make] = {
    "linear": lambda: (One(nn.Linear(8, 4)), (floats(3, 8),)),
    "linear of rank 4, no bias": lambda: (One(nn.Linear(8, 4, bias=False)), (floats(2, 3, 2, 8),)),
    "linear of rank 1": lambda: (One(nn.Linear(8, 4)), (floats(8),)),
    **{
        f"linear + {act.__class__.__name__}": lambda act=act: (
            nn.Sequential(nn.Linear(8, 4), act, nn.Linear(4, 4)),
            (floats(3, 8),),
        )
        for act in (nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.GELU())
    },
}
CONVOLUTIONS: dict[str, Make] = {
    "conv1d": lambda: (One(nn.Conv1d(4, 6, 3, padding=1)), (floats(2, 4, 7),)),
    "conv2d": lambda: (One(nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect")), (floats(2, 4, 7, 6),)),
    "conv2d + relu": lambda: (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()), (floats(2, 4, 7, 6),)),
    "conv3d": lambda: (One(nn.Conv3d(2, 6, 2, stride=2, bias=False)), (floats(2, 2, 4, 4, 4),)),
}
TABLES: dict[str, Make] = {
    "embedding": lambda: (One(nn.Embedding(10, 7, padding_idx=2)), (index(3, 2),)),
    "sparse embedding": lambda: (One(nn.Embedding(10, 8, sparse=True)), (index(3),)),
    "bag of rows": lambda: (One(nn.EmbeddingBag(10, 7)), (index(3, 4),)),
    "bag between offsets": lambda: (
        Two(nn.EmbeddingBag(10, 8, mode="max", padding_idx=3)),
        (index(6), torch.tensor([0, 2])),
    ),
    "weighted bag": lambda: (
        Bags(nn.EmbeddingBag(10, 8, mode="sum", include_last_offset=True)),
        (index(6), torch.tensor([0, 2, 6]), torch.rand(6)),
    ),
}
RECURRENT: dict[str, Make] = {
    **{name: lambda name=name: (One(getattr(nn, name)(8, 6)), (floats(5, 3, 8),)) for name in ("LSTM", "GRU", "RNN")},
    "LSTM with a state": lambda: (Two(nn.LSTM(8, 6)), (floats(5, 3, 8), (floats(1, 3, 6), floats(1, 3, 6)))),
    **{
        f"{name}Cell": lambda name=name: (One(getattr(nn, f"{name}Cell")(8, 6)), (floats(3, 8),))
        for name in ("LSTM", "GRU", "RNN")
    },
    "RNNCell with a state": lambda: (Two(nn.RNNCell(8, 6)), (floats(3, 8), floats(3, 6))),
}  # fmt: skip

DYNAMIC = {
    "dynamic": mappings.DYNAMIC,
    "default dynamic": of_all(qconfigs.DEFAULT_DYNAMIC),
    "7 bits": of_all(QConfig(Dynamic(QuantSpec(quant_max=127)), WEIGHTS)),
    "int8": of_all(QConfig(Dynamic(INT8_SYMMETRIC), WEIGHTS)),
}
WEIGHT_ONLY = {
    "weight only": mappings.WEIGHT_ONLY,
    "one scale": of_all(QConfig(KeepFloat(), MinMax(INT8_SYMMETRIC))),
    "affine": of_all(QConfig(KeepFloat(), PerChannelMinMax(QuantSpec("int8", -128, 127, "per_channel_affine", 0)))),
}
TABLE_CONFIGS = {
    "uint8": of_all(qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY),
    "uint4": of_all(qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY_4BIT),
    "int8 per row": mappings.WEIGHT_ONLY,
    "int8 affine": of_all(QConfig(KeepFloat(), MinMax(INT8))),
}
FLOAT16 = {"float16": mappings.FLOAT16_DYNAMIC}
STATIC = {"static float16": mappings.FLOAT16_STATIC}
SINGLE = {name: make for name, make in (LINEARS | CONVOLUTIONS).items() if "+" not in name}

# A float operator's rounding is its own, where what computes it is another one: there bits differ.
CASES = [
    *((layer, config, 25.0) for layer in LINEARS.items() for config in (DYNAMIC | WEIGHT_ONLY).items()),
    *((layer, config, 50.0) for layer in LINEARS.items() for config in FLOAT16.items()),
    *((layer, config, 50.0) for layer in SINGLE.items() for config in STATIC.items()),
    *((layer, config, 25.0) for layer in CONVOLUTIONS.items() for config in WEIGHT_ONLY.items()),
    *((layer, config, 15.0) for layer in TABLES.items() for config in TABLE_CONFIGS.items()),
    *((layer, config, 25.0) for layer in RECURRENT.items() for config in DYNAMIC.items()),
    *((layer, config, 50.0) for layer in RECURRENT.items() for config in FLOAT16.items()),
]  # fmt: skip


def staged(
    model: nn.Module, mapping: QConfigMapping | None, inputs: tuple[Any, ...], batches: Any = (), engine: str = "onednn"
) -> Any:
    graph = unwrap(trace(model, inputs).bind(fuse))
    converted = unwrap(calibrate(unwrap(prepare(graph, mapping)), batches).bind(convert))
    return converted, unwrap(lower(converted, engine=engine, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "mapping", "least"),
    [(make, mapping, least) for (_, make), (_, mapping), least in CASES],
    ids=[f"{layer}: {config}" for (layer, _), (config, _), _ in CASES],
)
def test_every_layer_is_lowered_without_data(make: Make, mapping: QConfigMapping, least: float) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    converted, lowered = staged(model, mapping, inputs)
    assert all(entry.kernel for entry in lowered.certificate.entries if entry.intended)
    assert [off for off in kernels_off(converted, lowered, [inputs]) if off] == []
    module, reference = unwrap(materialize(lowered)), unwrap(materialize(converted))
    assert sqnr(model(*inputs), module(*inputs)) > least
    assert sqnr(reference(*inputs), module(*inputs)) > least + 5
    weights = [value for name, value in module.state_dict().items() if "weight" in name and value.dim() > 1]
    assert weights
    assert all(value.element_size() < 4 for value in weights)
    if "LSTM" not in str(inputs):
        again = unwrap(quantize(model, [], qconfig_mapping=mapping, strict=True))
        assert same_bits(unwrap(materialize(again))(*inputs), module(*inputs))


# Of each layer one configuration a kind; torch's own kernels are tried first, and the plain ones stand behind them.
ANY_ENGINE = [
    *((layer, config) for layer in LINEARS.items() for config in (DYNAMIC | WEIGHT_ONLY | FLOAT16).items()),
    *((layer, config) for layer in CONVOLUTIONS.items() for config in (WEIGHT_ONLY | STATIC).items()),
    *((layer, config) for layer in TABLES.items() for config in TABLE_CONFIGS.items()),
    *((layer, config) for layer in RECURRENT.items() for config in (DYNAMIC | FLOAT16).items()),
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.skipif(not check_host().quantized_engines, reason="torch has no engines of its own here")
@pytest.mark.parametrize("layers", [LINEARS, CONVOLUTIONS, TABLES, RECURRENT], ids=["linear", "conv", "table", "rnn"])
def test_the_quantized_engine_has_a_kernel_wherever_the_default_one_has(layers: dict[str, Make]) -> None:
    for (layer, make), (config, mapping) in ANY_ENGINE:
        if layer not in layers:
            continue
        torch.manual_seed(0)
        model, inputs = make()
        model.eval()
        converted, lowered = staged(model, mapping, inputs, engine="quantized")
        assert all(entry.kernel for entry in lowered.certificate.entries if entry.intended), (layer, config)
        assert [off for off in kernels_off(converted, lowered, [inputs]) if off] == [], (layer, config)
        assert sqnr(model(*inputs), unwrap(materialize(lowered))(*inputs)) > 15, (layer, config)


FORMS: dict[str, tuple[Make, QConfigMapping, str]] = {
    "int8 rows times floats": (LINEARS["linear"], mappings.WEIGHT_ONLY, "weights"),
    "codes that are dequantized": (CONVOLUTIONS["conv2d"], mappings.WEIGHT_ONLY, "weights"),
    "looked up": (TABLES["embedding"], TABLE_CONFIGS["uint8"], "weights"),
    "float16": (LINEARS["linear"], mappings.FLOAT16_DYNAMIC, "weights"),
    "recurrent float16": (RECURRENT["LSTM"], mappings.FLOAT16_DYNAMIC, "weights"),
    "dynamic": (LINEARS["linear"], mappings.DYNAMIC, "integer"),
    "recurrent dynamic": (RECURRENT["LSTM"], mappings.DYNAMIC, "integer"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize("name", FORMS)
def test_float_arithmetic_on_integer_weights_is_not_counted_as_int8(name: str, engine: str) -> None:
    make, mapping, form = FORMS[name]
    model, inputs = make()
    _, lowered = staged(model.eval(), mapping, inputs, engine=engine)
    certificate = lowered.certificate
    (entry,) = [entry for entry in certificate.entries if entry.intended]
    assert entry.form == form
    assert (certificate.in_int8, certificate.on_weights) == ((1, 0) if form == "integer" else (0, 1))
    assert not certificate.fallbacks
    assert entry.verdict in ("not checked", f"keeps {', '.join(v.kernel for v in entry.contracts)}")
    if certificate.multiply_adds:
        assert certificate.int8_share == (form == "integer")
    assert ("in float on smaller weights" in str(certificate)) == (form == "weights")
    assert unwrap(read_certificate(unwrap(to_json(certificate)))) == certificate


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_what_gives_floats_in_the_quantized_engine_feeds_its_integer_layers() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bags, self.cell = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8), nn.GRUCell(8, 8)
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.fc(self.words(x[:, 0])) + self.fc(self.bags(x))
            return self.head(self.cell(torch.relu(mixed)))

    torch.manual_seed(0)
    model, batches = Text().eval(), [index(4, 5)]
    mapping = qfunc.NATIVE.qconfig_mapping.set_object_type(nn.GRUCell, mappings.DYNAMIC.global_qconfig)
    for table in (nn.Embedding, nn.EmbeddingBag):
        mapping = mapping.set_object_type(table, qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY)
    graph = unwrap(trace(model, batches[0]).bind(lambda found: fuse(found, backend=qfunc.NATIVE)))
    prepared = unwrap(prepare(graph, mapping, backend=qfunc.NATIVE))
    converted = unwrap(calibrate(prepared, batches).bind(convert))
    lowered = unwrap(lower(converted, engine="quantized", strict=True))
    kernels = {entry.node: (entry.kernel, entry.output) for entry in lowered.certificate.entries}
    assert kernels["words"] == ("quantized.embedding", "float32")
    assert kernels["bags"] == ("codes.embedding_bag", "float32")
    assert kernels["cell"] == ("recurrent_dynamic", "float32")
    assert kernels["fc"][0] == kernels["head"][0] == "quantized.linear"
    assert [off for off in kernels_off(converted, lowered, [(batches[0],)]) if off] == []
    assert sqnr(model(batches[0]), unwrap(materialize(lowered))(batches[0])) > 20


@torch.no_grad()
@pytest.mark.parametrize("config", TABLE_CONFIGS)
def test_parameters_of_the_model_are_looked_up_as_codes_and_the_float_ones_are_gone(config: str) -> None:
    torch.manual_seed(0)
    model = Functions().eval()
    x = index(3, 4)
    converted, lowered = staged(
        model, TABLE_CONFIGS[config].set_object_type(F.linear, mappings.WEIGHT_ONLY.global_qconfig), (x,)
    )
    module = unwrap(materialize(lowered))
    assert {entry.kernel for entry in lowered.certificate.entries if entry.intended} == {
        "codes.embedding",
        "codes.embedding_bag",
        "int8_weight.linear",
    }
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []
    assert all(v.element_size() == 1 for v in module.state_dict().values() if v.dim() > 1)


@torch.no_grad()
def test_another_user_of_a_linear_layer_does_not_see_the_relu_behind_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            z = F.linear(torch.relu(y), self.weight)
            return torch.relu(z) + z + y

    torch.manual_seed(0)
    model, x = Shared().eval(), floats(5, 8)
    for mapping in (mappings.DYNAMIC, mappings.FLOAT16_DYNAMIC, mappings.WEIGHT_ONLY):
        module = unwrap(quantize(model, [], qconfig_mapping=mapping).bind(materialize))
        assert sqnr(model(x), module(x)) > 25


@torch.no_grad()
def test_embeddings_feed_integer_layers() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.bags = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8)
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.fc(self.words(x).mean(1)) + self.fc(self.bags(x))))

    torch.manual_seed(0)
    model, batches = Text().eval(), [index(4, 5)]
    table = qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY
    mapping = qfunc.CPU.qconfig_mapping.set_object_type(nn.Embedding, table).set_object_type(nn.EmbeddingBag, table)
    converted, lowered = staged(model, mapping, (batches[0],), batches)
    by_node = {entry.operator: entry for entry in lowered.certificate.entries}
    assert by_node["embedding_bag"].output == "uint8"
    assert [off for off in kernels_off(converted, lowered, [(batches[0],)]) if off] == []
    assert sqnr(model(batches[0]), unwrap(materialize(lowered))(batches[0])) > 20


@torch.no_grad()
def test_a_dynamic_layer_feeds_integer_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = floats(16, 8)
    mapping = qfunc.CPU.qconfig_mapping.set_module_name("0", mappings.DYNAMIC.global_qconfig)
    converted, lowered = staged(model, mapping, (x,), [x])
    first = lowered.certificate.entries[0]
    assert (first.kernel, first.output) == ("onednn.linear_dynamic", "uint8")
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []


WHY_NOT: dict[str, tuple[Make, QConfigMapping, str]] = {
    "affine weight": (LINEARS["linear"], of_all(QConfig(Dynamic(), MinMax(INT8))), "symmetric int8"),
    "affine recurrent weight": (RECURRENT["GRU"], of_all(QConfig(Dynamic(), MinMax(INT8))), "symmetric int8"),
}


@pytest.mark.parametrize("name", WHY_NOT)
def test_what_has_no_kernel_says_why(name: str) -> None:
    make, mapping, reason = WHY_NOT[name]
    model, _ = make()
    lowered = unwrap(quantize(model.eval(), [], qconfig_mapping=mapping))
    (entry,) = (entry for entry in lowered.certificate.entries if entry.intended)
    assert not entry.kernel
    assert reason in entry.reason


def test_a_table_that_is_renormalized_stays_float_and_is_no_silent_fallback() -> None:
    model = One(nn.Embedding(10, 8, max_norm=1.0)).eval()
    lowered = unwrap(quantize(model, [], qconfig_mapping=TABLE_CONFIGS["uint8"]))
    (entry,) = lowered.certificate.entries
    assert not entry.kernel
    assert entry.reason


def test_without_data_what_is_measured_is_an_error_still() -> None:
    failed = quantize(One(nn.Linear(8, 4)).eval(), []).failure()
    assert isinstance(failed, NoBatches)
