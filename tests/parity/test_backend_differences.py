"""Every difference between the default backend and the parity one, with its reason and a model that shows it."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from qfunc import (
    CPU,
    X86,
    Cast,
    Dynamic,
    Histogram,
    MeanSquaredError,
    QConfigMapping,
    annotate,
    calibrate,
    fuse,
    prepare,
    trace,
    unwrap,
)
from qfunc.backends import default_mappings, qconfigs
from qfunc.errors import UnsupportedDType, problems


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


class Forms(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Linear(256, 4)

    def forward(self, x):
        return self.two(self.one(x).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.one(x)
        return self.out(F.relu(self.two(y) + y))


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.out(F.hardtanh(self.conv(x), 0.0, 0.25))


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.out(self.conv(x) * 20)


class Norm(nn.Module):
    def __init__(self, conv=None):
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        n = self.norm
        x = self.conv(x)
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.out = nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.out(self.drop(self.conv(x)))


class Pooled(nn.Module):
    """Only the rearrangement of a float input, read in float: nothing is gained by quantizing it."""

    def forward(self, x):
        return F.max_pool2d(x, 2).softmax(1)


class PreNorm(nn.Module):
    """A batch norm that nothing precedes."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(torch.sin(self.norm(x)))


def convs(*between):
    """A model's maker: modules between two convolutions."""
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 1), *(made() for made in between), nn.Conv2d(4, 4, 1))


def linears(*between):
    """A model's maker: modules between two linear layers."""
    return lambda: nn.Sequential(nn.Linear(8, 8), *(made() for made in between), nn.Linear(8, 8))


def norm():
    made = nn.BatchNorm2d(4)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2.0)
    return made


def transposed():
    return nn.ConvTranspose2d(4, 4, 2, stride=2)


def calibrated(model, backend):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model().eval()
        batches = [torch.randn(4, 4, 8, 8) for _ in range(3)]
    stage = unwrap(prepare(unwrap(fuse(unwrap(trace(made, batches[0])), backend=backend)), backend=backend))
    return unwrap(calibrate(stage, batches, progress=False))


def kinds(stage):
    operators = (node for node in stage.graph if node.kind not in ("placeholder", "get_attr", "output"))
    return [" + ".join((node.kind, *(post.kind for post in node.post))) for node in operators]


def shares(stage, one, other):
    return stage.prepared.outputs[one] == stage.prepared.outputs[other]


def quantized(stage):
    return set(stage.prepared.outputs)


def weight_range(stage):
    return {observer.spec.quant_min for observer in stage.prepared.weights.values()}


def activation_range(stage):
    return {site.observer.spec.quant_max for site in stage.prepared.sites.values()}


def observers(stage):
    return {type(site.observer) for site in stage.prepared.sites.values()}


@dataclass(frozen=True)
class Difference:
    """`look` gives `cpu` at the default backend and `x86` at the parity one."""

    what: str
    reason: str
    model: object
    look: object
    cpu: object
    x86: object

    def __str__(self):
        return self.what.replace(" ", "-")


DIFFERENCES = (
    Difference(
        "8 bits of activations",
        "the kernels are exact, as weights are limited on hosts where they could overflow; 6 dB less noise",
        *(Relu, activation_range, {255}, {127}),
    ),
    Difference(
        "least squared error by an exact histogram",
        "its states merge whatever the order and split of the data, and serve other observers; it is as accurate",
        *(Relu, observers, {MeanSquaredError}, {Histogram}),
    ),
    Difference(
        "symmetric range of weights",
        "-127..127 is its own negative, so that the largest weight of a channel is not clipped",
        *(Relu, weight_range, {-127}, {-128}),
    ),
    Difference(
        "torch.relu fused",
        "how an operator is written says nothing about what it computes",
        *(Relu, kinds, ["conv2d + relu", "conv2d"], ["conv2d", "relu", "conv2d"]),
    ),
    Difference(
        "x.flatten quantized",
        "how an operator is written says nothing about what it computes",
        *(Forms, lambda s: "flatten" in quantized(s), True, False),
    ),
    Difference(
        "sum fused",
        "the convolution's own result is never rounded, and one kernel reads and writes less than two",
        *(Residual, kinds, ["conv2d", "conv2d + add + relu", "conv2d"], ["conv2d", "conv2d", "add + relu", "conv2d"]),
    ),
    Difference(
        "clamp fused",
        "the observed range is the clamped one, so that no code stands for what is clamped away",
        *(Clamped, kinds, ["conv2d + clamp", "conv2d"], ["conv2d", "clamp", "conv2d"]),
    ),
    *(
        Difference(
            f"{kind} fused behind a {layer}",
            "the kernel computes it before it rounds",
            *(model(activation), kinds, [f"{layer} + {kind}", layer], [layer, kind, layer]),
        )
        for layer, model, kind, activation in (
            ("conv2d", convs, "silu", nn.SiLU),
            ("conv2d", convs, "hardswish", nn.Hardswish),
            ("linear", linears, "silu", nn.SiLU),
            ("linear", linears, "hardswish", nn.Hardswish),
            ("linear", linears, "gelu", nn.GELU),
            ("linear", linears, "leaky_relu", nn.LeakyReLU),
            ("linear", linears, "tanh", nn.Tanh),
        )
    ),
    Difference(
        "SiLU and GELU on integers, wherever they stand",
        "a table of 256 entries is exact for any function of one operand",
        *(
            convs(lambda: nn.MaxPool2d(1), nn.SiLU, nn.GELU),
            lambda s: {"2", "3"} & {p.strip("_") for p in quantized(s)},
            {"2", "3"},
            set(),
        ),
    ),
    Difference(
        "transposed convolution with a scale for each output channel",
        "its output channels are axis 1 of its weight, and the kernel takes a scale for each",
        *(convs(transposed), lambda s: {w.spec.ch_axis for w in s.prepared.weights.values()}, {0, 1}, {0, None}),
    ),
    Difference(
        "any batch norm folded into a transposed convolution",
        "how an operator is written says nothing about what it computes",
        *(lambda: Norm(transposed()), kinds, ["conv_transpose2d"], ["conv_transpose2d", "batch_norm"]),
    ),
    Difference(
        "batch norm folded into the layer behind it",
        "where that does not pad, it is the same function with an operator less",
        *(lambda: nn.Sequential(nn.ReLU(), norm(), nn.Conv2d(4, 4, 1)), kinds),
        *(["relu", "conv2d"], ["relu", "batch_norm", "conv2d"]),
    ),
    Difference(
        "batch norm folded before an average pool",
        "an average commutes with it, so that the layer before both can take it in",
        *(convs(lambda: nn.AvgPool2d(2), norm), kinds),
        *(["conv2d", "avg_pool2d", "conv2d"], ["conv2d", "avg_pool2d", "batch_norm", "conv2d"]),
    ),
    Difference(
        "functional batch norm folded",
        "how an operator is written says nothing about what it computes",
        *(Norm, kinds, ["conv2d"], ["conv2d", "batch_norm"]),
    ),
    Difference(
        "float outputs",
        "what nobody reads quantized is not rounded: the kernels can write float32",
        *(Relu, lambda s: "conv_1" in quantized(s), False, True),
    ),
    Difference(
        "useless conversions left out",
        "a rearrangement between float operators loses precision and time when it is quantized",
        *(Pooled, lambda s: len(s.prepared.sites), 0, 1),
    ),
    Difference(
        "range of its own after a number",
        "a sum or product with a number has another range than its input",
        *(Shifted, lambda s: shares(s, "conv", "mul"), False, True),
    ),
    Difference(
        "dropout removed",
        "it is the identity in evaluation",
        *(Dropped, kinds, ["conv2d", "conv2d"], ["conv2d", "dropout", "conv2d"]),
    ),
    Difference(
        "unfused batch norm float",
        "there is no kernel for it on plain tensors",
        *(PreNorm, lambda s: "norm" in quantized(s), False, True),
    ),
)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=str)
def test_difference(difference):
    for backend, expected in ((CPU, difference.cpu), (X86, difference.x86)):
        assert difference.look(calibrated(difference.model, backend)) == expected, backend.name


class Mixed(nn.Module):
    """A table of vectors, a linear layer, a recurrent one, a sum, a convolution."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.conv = nn.Embedding(10, 8), nn.Linear(8, 4), nn.Conv1d(1, 4, 1)
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x):
        y, _ = self.lstm(self.linear(self.table(x)))
        return self.conv(torch.relu(y) + y)


CONFIGURED = (
    # mapping, what is quantized when the model runs, weights quantized with CPU, and with X86 (None: an error)
    (default_mappings.DYNAMIC, {"linear": Dynamic(), "lstm": Dynamic()}, {"linear", "lstm"}, {"linear", "lstm"}),
    (
        default_mappings.FLOAT16_DYNAMIC,
        {"linear": Cast("float16", dynamic=True), "lstm": Cast("float16", dynamic=True)},
        {"linear", "lstm"},
        {"linear", "lstm"},
    ),
    (default_mappings.FLOAT16_STATIC, {}, {"linear", "conv"}, None),
    (default_mappings.WEIGHT_ONLY, {}, {"table", "linear", "conv"}, None),
    (QConfigMapping(qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY), {}, {"table"}, {"table"}),
    (QConfigMapping(qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY_4BIT), {}, {"table"}, {"table"}),
)


@pytest.mark.parametrize(("mapping", "dynamic", "cpu", "x86"), CONFIGURED)
def test_other_configurations(mapping, dynamic, cpu, x86):
    """Weights alone are quantized in int8 by the default backend only, and only it takes static float16."""
    graph = unwrap(fuse(unwrap(trace(Mixed().eval(), (torch.tensor([[1]]),)))))
    for backend, expected in ((CPU, cpu), (X86, x86)):
        result = annotate(graph, mapping, backend=backend)
        if expected is None:
            assert {type(problem) for problem in problems(result.failure())} == {UnsupportedDType}
            continue
        found = unwrap(result)
        assert set(found.weights) == expected
        assert all(found.weights[id] == mapping.global_qconfig.weight for id in expected)
        inputs = {edge.user: quantization for edge, quantization in found.inputs.items()}
        assert {id: inputs[id] for id in dynamic} == dynamic


def test_static_float16_is_for_values_and_biases():
    graph = unwrap(fuse(unwrap(trace(Mixed().eval(), (torch.tensor([[1]]),)))))
    found = unwrap(annotate(graph, default_mappings.FLOAT16_STATIC))
    assert dict(found.outputs) == {id: Cast("float16") for id in ("relu", "add")}
    assert set(found.biases) == {"linear", "conv"}
    assert {(edge.user, quantization) for edge, quantization in found.inputs.items()} == {
        (id, Cast("float16")) for id in ("linear", "relu", "add", "conv")
    }


FLOAT_HERE = {
    "no engine has a kernel for it on plain integers, so that quantizing it would only add noise": (
        *("matmul", "group_norm", "instance_norm"),
    ),
    "it writes to its input": (".resize_",),
    "a division that rounds down does not keep the range of its operand": ("floor_divide",),
    "this way of writing does not exist in torch any more": (".hardsigmoid", ".hardsigmoid_"),
    "it asks for sizes: what is no tensor is known from the graph, no row is needed": (".size", "builtins.getattr"),
}
"""What the parity backend quantizes and the default one leaves float, by reason."""

QUANTIZED_HERE = {
    "a table of 256 entries is exact for any function of one operand": (
        *("abs", "celu", "div", "erf", "exp", "gelu", "hardshrink", "log", "logsigmoid", "mish", "neg", "pow"),
        *("reciprocal", "rsqrt", "selu", "silu", "softplus", "softshrink", "softsign", "sqrt", "tanhshrink"),
        "threshold",
    ),
    "a difference is a sum, of numbers as well": ("sub",),
    "a sum of codes is exact": ("sum",),
    "the largest codes are those of the largest values": (
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    ),
    "it only moves or repeats elements": (
        *("channel_shuffle", "expand", "flip", "getitem", "index_select", "movedim", "pad", "roll", "select"),
        "unflatten",
    ),
    "it is a recurrent layer like those that the parity backend quantizes as the model runs": ("torch.nn.RNN",),
}
OBSERVED_OTHERWISE = {
    "a sum or product with a number has another range than its operand": ("add", "mul"),
    "the range of an average is narrower than that of what it averages": (
        *(f"{pool}{rank}d" for pool in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)),
        "mean",
    ),
    "in evaluation it is the identity": ("dropout",),
}


def by_kind(backend):
    rows = {}
    for row in backend.operators:
        for kind in row.kinds:
            rows.setdefault(kind, row)
    return rows


def test_every_operator_in_which_the_backends_differ_has_a_reason():
    cpu, x86 = by_kind(CPU), by_kind(X86)
    told = [sorted(kind for kinds in table.values() for kind in kinds)
            for table in (FLOAT_HERE, QUANTIZED_HERE, OBSERVED_OTHERWISE)]  # fmt: skip
    observed = [
        (cpu[kind].observation, cpu[kind].by_tensor_count) != (x86[kind].observation, x86[kind].by_tensor_count)
        for kind in sorted(cpu.keys() & x86.keys())
    ]
    common = sorted(cpu.keys() & x86.keys())
    assert told[0] == sorted(x86.keys() - cpu.keys())
    assert told[1] == sorted(cpu.keys() - x86.keys())
    assert told[2] == [kind for kind, differs in zip(common, observed, strict=True) if differs]
    for kind in common:  # the same in static int8, which comes first; float16 and weights alone are for CPU only
        activations = {str(dtypes).split(" and ")[0] for dtypes in x86[kind].dtypes}
        assert str(cpu[kind].dtypes[0]).split(" and ")[0] in activations
