"""`CPU`: qfunc's own backend, the default.

It differs from the reference's x86 backend (`qfunc.backends.parity.X86`) where that is wrong or gives accuracy away:

- activations use all 8 bits (the reference keeps 7, because some kernels may overflow; here `lower` limits the weights
  on the hosts whose kernels do);
- every way of writing an operator counts (`torch.relu`, `x.flatten()`, `torch.concat`, ...);
- a sum after a 1d or 2d convolution is a post-op of it, so that the convolution's own result is never rounded;
- every activation that a kernel computes behind its layer is fused (ReLU6, hardtanh, clamp, hardswish, SiLU, and behind
  linear layers GELU, LeakyReLU and tanh), so that the layer's own result is never rounded;
- a batch norm is also folded into the layer behind it, and before the average pool that it follows, where that is
  exact; transposed convolutions take part;
- the last operators, whose result nobody reads quantized, write float32;
- a sum or product with a number has its own range, which need not be its input's, and so has an average, whose range is
  narrower; a float value is quantized behind a ReLU or clamp, not before it;
- parts of tensors, their stacks, their paddings and their resizings stay on integers;
- so do transposed convolutions, with a scale for each output channel (their axis 1), batch norms that nothing takes in,
  differences and sums scaled by alpha, adaptive maxima, PReLU, and functions of one element, which are tables;
- weights use the range -127..127, which is its own negative, so that the largest weight is not clipped;
- the weights of layers can be quantized alone, and most operators can be cast to float16;
- dropout and identity are removed.
"""

from __future__ import annotations

from dataclasses import replace

from qfunc.backends import dtypes as d
from qfunc.backends.default_mappings import TRANSPOSED as TRANSPOSED_FORMS
from qfunc.backends.operators import recurrent
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.weights import RECURRENT
from qfunc.match import Pattern, Step
from qfunc.numerics.observers import FixedQParams, PerChannelMinMax
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8
from qfunc.numerics.search_observers import MeanSquaredError
from qfunc.ops.shapes import PARTS

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

MAX_POOLS = tuple(f"{pool}{rank}d" for pool in ("max_pool", "adaptive_max_pool") for rank in (1, 2, 3))
AVERAGES = (*(f"{pool}{rank}d" for pool in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)), "mean", "sum")
ARITHMETIC = ("add", "sub", "mul", "div", "pow")
ELEMENTWISE = (
    *("hardswish", "silu", "gelu", "leaky_relu", "elu", "selu", "celu", "mish", "softplus"),
    *("logsigmoid", "softsign", "tanhshrink", "hardshrink", "softshrink", "threshold"),
    *("abs", "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "erf"),
)
"""Functions of one element, with numbers as options."""
SCALED = ("batch_norm", "prelu")
"""What has a factor of its own for each channel."""
REARRANGEMENTS = (
    *("flatten", "unflatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "detach"),
    *(
        "getitem",
        "narrow",
        "select",
        "index_select",
        "expand",
        "repeat",
        "repeat_interleave",
        "flip",
        "roll",
        "movedim",
    ),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "dropout", "identity"),
)
MOVES = PARTS.union(REARRANGEMENTS)
"""What only moves elements of one tensor."""


_NORMS: tuple[tuple[str, ...], ...] = ((), ("batch_norm",))
_POST_OPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("conv1d", ("relu", "clamp", "hardswish", "silu")),
    ("conv2d", ("relu", "clamp", "hardswish", "silu")),
    ("conv3d", ("relu", "clamp")),
    ("linear", ("relu", "clamp", "hardswish", "silu", "leaky_relu", "tanh", "gelu")),
)
"""The layers, and the activations that their kernels compute behind them."""


def _chain(*kinds: str) -> Pattern:
    steps = (Step((kind,), takes=("input", "other") if kind == "add" else ("input",)) for kind in kinds[1:])
    repeated = tuple(replace(step, repeats=True) if step.kinds == ("batch_norm",) else step for step in steps)
    return Pattern(" + ".join(kinds), (Step(kinds[:1]), *repeated))


def _chains() -> tuple[Pattern, ...]:
    chains: list[tuple[str, ...]] = []
    for layer, activations in _POST_OPS:
        chains += [(layer, "batch_norm"), *((layer, *norm, act) for norm in _NORMS for act in activations)]
    sums = [(conv, *norm, "add") for conv in ("conv1d", "conv2d") for norm in _NORMS]
    chains += [(*head, *tail) for head in sums for tail in ((), ("relu",), ("clamp",))]
    for layer in TRANSPOSED:
        chains += [(layer, "batch_norm"), *((layer, *norm, act) for norm in _NORMS for act in ("relu", "clamp"))]
    chains += [(kind, act) for kind in ("batch_norm", "add", "sub", "mul") for act in ("relu", "clamp")]
    return tuple(_chain(*chain) for chain in chains)


_AS_THE_MODEL_RUNS = (d.DYNAMIC_INT8, d.DYNAMIC_SIGNED, d.DYNAMIC_FLOAT16)
_FLOAT_VALUES = (d.STATIC_FLOAT16, d.WEIGHT_INT8)
_PLAIN = (d.PLAIN, d.PLAIN_FLOAT16)


def _fixed(scale: float, zero_point: int) -> FixedQParams:
    return FixedQParams(UINT8, scale, zero_point)


def _mapping() -> QConfigMapping:
    """The same for all, but that the output channels of a transposed convolution's weight are its axis 1."""
    qconfig = QConfig(activation=MeanSquaredError(UINT8), weight=PerChannelMinMax(INT8_NARROW_PER_CHANNEL))
    transposed = replace(qconfig, weight=PerChannelMinMax(replace(INT8_NARROW_PER_CHANNEL, ch_axis=1)))
    mapping = QConfigMapping().set_global(qconfig)
    for form in TRANSPOSED_FORMS:
        mapping = mapping.set_object_type(form, transposed)
    return mapping


CPU = BackendConfig(
    name="cpu",
    fusions=_chains(),
    operators=(
        OperatorConfig(CONVOLUTIONS, Observation.OWN, (d.LAYER, *_FLOAT_VALUES), float_output=True),
        OperatorConfig(
            *(("linear",), Observation.OWN),
            (d.LAYER, *_AS_THE_MODEL_RUNS, *_FLOAT_VALUES),
            float_output=True,
        ),
        OperatorConfig(TRANSPOSED, Observation.OWN, (d.LAYER, *_FLOAT_VALUES), float_output=True),
        OperatorConfig((*ARITHMETIC, *ELEMENTWISE, *AVERAGES), Observation.OWN, _PLAIN),
        OperatorConfig(SCALED, Observation.OWN, (d.PLAIN,)),
        OperatorConfig(("sigmoid", "hardsigmoid"), Observation.OWN, (d.PLAIN,), fixed=_fixed(1 / 256, 0)),
        # masked scores, most of them -10,000, have no scale that suits them: a softmax reads floats
        OperatorConfig(("softmax",), Observation.OWN, (d.PLAIN,), fixed=_fixed(1 / 256, 0), inputs=()),
        OperatorConfig(("tanh",), Observation.OWN, (d.PLAIN,), fixed=_fixed(2 / 256, 128)),
        OperatorConfig(("relu", "clamp"), Observation.SHARED, _PLAIN, narrows=True),
        OperatorConfig((*MAX_POOLS, "cat", "stack", "pad", "interpolate", *REARRANGEMENTS), Observation.SHARED, _PLAIN),
        OperatorConfig(
            ("embedding", "embedding_bag"), Observation.OWN, (d.WEIGHT_UINT8, d.WEIGHT_UINT4, d.WEIGHT_INT8)
        ),
        replace(recurrent(_AS_THE_MODEL_RUNS), kinds=tuple(sorted(RECURRENT)), forms=RECURRENT),
    ),
    qconfig_mapping=_mapping(),
    lazy=True,
    observe_shared_outputs=False,
    drop_identities=True,
    move_norms=True,
)
"""qfunc's own backend: oneDNN's int8 kernels on plain tensors."""
