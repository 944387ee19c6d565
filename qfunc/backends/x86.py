"""`X86`: the reference's x86 backend and default configuration, for parity.

Only the ways of writing that the reference lists are fused and quantized; activations use 7 bits.
"""

from __future__ import annotations

from qfunc.backends.cpu import CONVOLUTIONS
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.qconfig import QConfig, QConfigMapping
from qfunc.match import Pattern, Step
from qfunc.numerics.observers import FixedQParams, Histogram, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED

_F = "torch.nn.functional"
_RELUS = frozenset({"torch.nn.ReLU", f"{_F}.relu"})
# `y += x` is traced by the reference as operator.add.
_BINARY = frozenset({"operator.add", "operator.iadd", "torch.add", "operator.mul", "operator.imul", "torch.mul"})


def _modules(*names: str) -> frozenset[str]:
    return frozenset(f"torch.nn.{name}" for name in names)


def _chain(*steps: Step) -> Pattern:
    return Pattern(" + ".join("/".join(step.kinds) for step in steps), steps)


def _fusions() -> tuple[Pattern, ...]:
    relu = Step(("relu",), _RELUS)
    chains = []
    for rank in (1, 2, 3):
        kinds = (f"conv{rank}d",)
        conv = Step(kinds, _modules(f"Conv{rank}d"))
        norm = Step(("batch_norm",), _modules(f"BatchNorm{rank}d"))
        chains += [_chain(conv, norm, relu), _chain(conv, norm), _chain(Step(kinds), relu)]
        if rank > 1:
            chains.append(_chain(norm, relu))
    linear = Step(("linear",), _modules("Linear"))
    norm = Step(("batch_norm",), _modules("BatchNorm1d"))
    chains += [_chain(linear, norm, relu), _chain(linear, norm), _chain(Step(("linear",)), relu)]
    chains.append(_chain(Step(("add", "mul"), _BINARY), Step(("relu",), _RELUS | {"torch.relu"})))
    return tuple(chains)


_OWN = _modules("Hardswish", "Dropout") | {f"{_F}.hardswish", f"{_F}.dropout"}
_NORMS = _modules("BatchNorm2d", "BatchNorm3d")
_SIGMOIDS = (
    _modules("Hardsigmoid", "Sigmoid") | {f"{_F}.hardsigmoid", "torch.sigmoid", "torch.nn.functional.sigmoid"}
) | {".hardsigmoid", ".hardsigmoid_", ".sigmoid", ".sigmoid_"}
_TANHS = _modules("Tanh") | {"torch.tanh", ".tanh", ".tanh_"}
_SHARED = (
    _modules(
        *(f"{name}{rank}d" for name in ("AdaptiveAvgPool", "AvgPool", "MaxPool") for rank in (1, 2, 3)),
        *("Hardtanh", "Identity", "ReLU", "ReLU6"),
    )
    | {f"{_F}.{name}{rank}d" for name in ("adaptive_avg_pool", "avg_pool", "max_pool") for rank in (1, 2, 3)}
    | {f"{_F}.{name}" for name in ("hardtanh", "hardtanh_", "relu", "relu6")}
    | {"torch.adaptive_avg_pool1d", "torch.avg_pool1d"}  # what torch.nn.functional exports under its own name
    | {f"torch.{name}" for name in ("cat", "clamp", "flatten", "mean", "transpose", "squeeze", "unsqueeze")}
    | {f".{name}" for name in ("contiguous", "clamp", "mean", "permute", "reshape", "relu", "relu_", "squeeze")}
    | {".transpose", ".unsqueeze", ".view"}
)
_SHARED_KINDS = (
    *(f"{name}{rank}d" for name in ("adaptive_avg_pool", "avg_pool", "max_pool") for rank in (1, 2, 3)),
    *("clamp", "identity", "relu", "cat", "flatten", "mean", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "permute", "reshape"),
)


X86 = BackendConfig(
    name="x86",
    fusions=_fusions(),
    operators=(
        OperatorConfig((*CONVOLUTIONS, "linear"), Observation.OWN),
        OperatorConfig(("add", "mul"), Observation.BY_TENSORS, forms=_BINARY),
        OperatorConfig(("hardswish", "dropout"), Observation.OWN, forms=_OWN),
        OperatorConfig(("batch_norm",), Observation.OWN, forms=_NORMS),
        OperatorConfig(
            ("sigmoid", "hardsigmoid"), Observation.OWN, forms=_SIGMOIDS, fixed=FixedQParams(UINT8, 1 / 256, 0)
        ),
        OperatorConfig(("tanh",), Observation.OWN, forms=_TANHS, fixed=FixedQParams(UINT8, 2 / 256, 128)),
        OperatorConfig(_SHARED_KINDS, Observation.SHARED, forms=_SHARED),
    ),
    qconfig_mapping=QConfigMapping().set_global(
        QConfig(activation=Histogram(UINT8_REDUCED), weight=PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
    ),
)
"""The reference's x86 backend with its default mapping."""
