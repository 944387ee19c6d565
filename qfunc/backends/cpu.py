"""`CPU`: qfunc's own backend, the default.

It differs from the reference's x86 backend (`qfunc.backends.x86.X86`) where that is wrong or gives accuracy away:

- activations use all 8 bits (the reference keeps 7, because some kernels may overflow; here `lower` limits the weights
  on the hosts whose kernels do);
- every way of writing an operator counts (`torch.relu`, `x.flatten()`, `torch.concat`, ...);
- a sum after a 2d convolution is a post-op of it, so that the convolution's own result is never rounded;
- ReLU6, hardtanh and clamp are fused, so that the observed range is the clamped one;
- the last operators, whose result nobody reads quantized, write float32;
- a sum or product with a number has its own range, which need not be its input's;
- weights use the range -127..127, which is its own negative, so that the largest weight is not clipped;
- dropout and identity are removed.
"""

from __future__ import annotations

from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.qconfig import QConfig, QConfigMapping
from qfunc.match import Pattern, Step
from qfunc.numerics.observers import FixedQParams, Histogram, PerChannelMinMax
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
ACTIVATIONS = Step(("relu", "clamp"))
_NORM = Step(("batch_norm",))
_SUM = Step(("add",), takes=("input", "other"))

MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
AVERAGE_POOLS = (
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
)
REARRANGEMENTS = (
    *("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("dropout", "identity"),
)


def _chains() -> tuple[Pattern, ...]:
    weighted = Step((*CONVOLUTIONS, "linear"))
    plain = Step(("conv2d",))
    tails = ((_NORM,), (ACTIVATIONS,), (_NORM, ACTIVATIONS))
    sums = ((_SUM,), (_SUM, ACTIVATIONS), (_NORM, _SUM), (_NORM, _SUM, ACTIVATIONS))
    others = Step(("batch_norm", "add", "mul"))
    chains = [(weighted, *tail) for tail in tails] + [(plain, *tail) for tail in sums] + [(others, ACTIVATIONS)]
    return tuple(Pattern(" + ".join("/".join(step.kinds) for step in chain), chain) for chain in chains)


def _fixed(scale: float, zero_point: int) -> FixedQParams:
    return FixedQParams(UINT8, scale, zero_point)


CPU = BackendConfig(
    name="cpu",
    fusions=_chains(),
    operators=(
        OperatorConfig((*CONVOLUTIONS, "linear"), Observation.OWN, float_output=True),
        OperatorConfig(("add", "mul", "hardswish"), Observation.OWN),
        OperatorConfig(("sigmoid", "hardsigmoid"), Observation.OWN, fixed=_fixed(1 / 256, 0)),
        OperatorConfig(("tanh",), Observation.OWN, fixed=_fixed(2 / 256, 128)),
        OperatorConfig((*AVERAGE_POOLS, "mean"), Observation.SHARED),
        OperatorConfig((*MAX_POOLS, "relu", "clamp", "cat", *REARRANGEMENTS), Observation.SHARED),
    ),
    qconfig_mapping=QConfigMapping().set_global(
        QConfig(activation=Histogram(UINT8), weight=PerChannelMinMax(INT8_NARROW_PER_CHANNEL))
    ),
    lazy=True,
    observe_shared_outputs=False,
    drop_identities=True,
)
"""qfunc's own backend: oneDNN's int8 kernels on plain tensors."""
