"""Hypothesis strategies for random fx-traceable models with inputs they run on, and random configurations of them.

A failing example shrinks towards few operators, written as plain modules with plain arguments, and prints as an
expression that builds it again:

    from hypothesis import given
    from qfunc.testing import models

    @given(models(families=("conv", "norm", "activation")))
    def test_mine(case):
        case.module(*case.example_inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from torch import nn

from qfunc.backends import CPU, EXECUTORCH, FBGEMM, NATIVE, ONEDNN, QNNPACK, TENSORRT, X86
from qfunc.config.backend_config import BackendConfig
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.ir import Graph
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.qparams import QuantSpec
from qfunc.testing.draft import T
from qfunc.testing.operations import FAMILIES
from qfunc.testing.program import ModelCase, Program, build
from qfunc.testing.walk import Case
from qfunc.testing.write import write_program


@st.composite
def programs(
    draw: st.DrawFn, *, max_nodes: int = 12, families: Sequence[str] = FAMILIES, aliasing: bool = False
) -> Program:
    """Programs as `write_program` writes them, every choice drawn.

    `max_nodes` bounds the number of steps, `families` says which operators may occur, and with `aliasing` in-place
    operators may write to memory that other values still read.
    """

    def pick(options: Sequence[T], /) -> T:
        return options[0] if len(options) == 1 else draw(st.sampled_from(options))

    return write_program(pick, max_nodes=max_nodes, families=families, aliasing=aliasing)


def models(
    *, max_nodes: int = 12, families: Sequence[str] = FAMILIES, aliasing: bool = False
) -> st.SearchStrategy[ModelCase]:
    """Models in eval mode with example inputs; the parameters are those of `programs`."""
    return programs(max_nodes=max_nodes, families=families, aliasing=aliasing).map(build)


_ACTIVATION_SPECS = (
    q.UINT8,
    q.UINT8_REDUCED,
    QuantSpec(quant_max=15),
    QuantSpec(quant_max=200),
    QuantSpec(qscheme="per_tensor_symmetric"),
    QuantSpec(eps=0.01),
)
_WEIGHT_SPECS = (
    q.INT8_NARROW_PER_CHANNEL,
    q.INT8_SYMMETRIC_PER_CHANNEL,
    q.INT8_SYMMETRIC,
    QuantSpec("int8", -8, 7, "per_channel_symmetric", 0),
    QuantSpec("int8", -128, 127, "per_channel_affine", 0),
    q.INT8,
)
_WRONG_SPECS = (
    QuantSpec("uint7"),
    QuantSpec("int8", -128, 127, "per_channel"),
    QuantSpec(quant_max=256),
    QuantSpec(quant_min=5, quant_max=3),
    QuantSpec(quant_min=1, quant_max=255),
    QuantSpec(quant_max=2.5),  # type: ignore[arg-type]
    QuantSpec("int32", -(2**31), 2**31 - 1),
    QuantSpec("uint16", 0, 65535),
    QuantSpec("int8", -128, 127),
    QuantSpec("int8", -128, 127, "per_channel_symmetric", 7),
    QuantSpec("int8", -128, 127, "per_channel_symmetric", 1),
    QuantSpec("int8", -128, 127, "per_channel_symmetric"),
    QuantSpec(ch_axis=0),
    QuantSpec(eps=0.0),
    QuantSpec(eps=float("nan")),
)
_OBJECT_TYPES = ("relu", "flatten", "mean", nn.Conv2d, nn.Linear, nn.ReLU, nn.Sequential)
_WRONG_REGEXES = ("(", "[", "*", "a{2,1}")


def _activation_observers(spec: QuantSpec) -> tuple[Any, ...]:
    fixed = o.FixedQParams(spec, 0.05, 0) if spec.qscheme.endswith("affine") else o.MinMax(spec)
    averages = (o.MovingAverageMinMax(spec), o.MovingAverageMinMax(spec, 0.5))
    return (o.MinMax(spec), *averages, o.Histogram(spec), o.Histogram(spec, 64, 2), fixed)


def _weight_observers(spec: QuantSpec) -> tuple[Any, ...]:
    if spec.qscheme.startswith("per_channel"):
        return o.PerChannelMinMax(spec), o.MovingAveragePerChannelMinMax(spec)
    return o.MinMax(spec), o.Histogram(spec)


def _wrong_observers(spec: QuantSpec) -> tuple[Any, ...]:
    """Observers with a spec that is impossible, or is so for them."""
    return (
        *(o.MinMax(spec), o.PerChannelMinMax(spec), o.Histogram(spec), o.FixedQParams(spec, 0.1, 0)),
        *(o.MovingAverageMinMax(q.UINT8, -1.0), o.Histogram(q.UINT8, 1), o.Histogram(q.UINT8, 64, 0)),
        *(o.FixedQParams(q.UINT8, 0.0, 0), o.FixedQParams(q.UINT8, 0.1, 300)),
    )


@st.composite
def qconfigs(draw: st.DrawFn, *, invalid: bool = False) -> QConfig:
    """Observers of activations and weights; with `invalid`, also ones that are impossible."""
    if invalid and draw(st.booleans()):
        wrong = st.sampled_from(_WRONG_SPECS).flatmap(lambda spec: st.sampled_from(_wrong_observers(spec)))
        return draw(st.builds(QConfig, wrong | st.just(o.MinMax()), wrong))
    activation = draw(st.sampled_from(_activation_observers(draw(st.sampled_from(_ACTIVATION_SPECS)))))
    weight = draw(st.sampled_from(_weight_observers(draw(st.sampled_from(_WEIGHT_SPECS)))))
    return QConfig(activation, weight)


@st.composite
def configurations(draw: st.DrawFn, model: nn.Module | Graph, *, invalid: bool = False) -> QConfigMapping:
    """Configurations of a model: entries of every strength for its own modules and types, some of them `None`.

    With `invalid`, also such that must be refused: unknown modules, dtypes and schemes, impossible ranges, bad regexes.
    """
    types: tuple[Any, ...]
    if isinstance(model, Graph):
        paths, types = sorted(model.modules), _OBJECT_TYPES
    else:
        named = dict(model.named_modules(remove_duplicate=False))
        paths, types = sorted(named), (*dict.fromkeys(map(type, named.values())), *_OBJECT_TYPES)
    unknown = ["no.such.module", "m"] if invalid else []
    names = st.sampled_from([*paths, *unknown])
    regexes = st.sampled_from([".*", r"m\d", "m0$", "0", "", *(_WRONG_REGEXES if invalid else ())])
    object_types = st.sampled_from([*types, *((3, "", None) if invalid else ())])
    choices = st.none() | qconfigs(invalid=invalid)
    mapping = QConfigMapping().set_global(draw(qconfigs(invalid=invalid) | st.none()))
    for _ in range(draw(st.integers(0, 3))):
        choice = draw(choices)
        match draw(st.sampled_from(["module", "type", "regex", "order"])):
            case "module":
                mapping = mapping.set_module_name(draw(names), choice)
            case "type":
                mapping = mapping.set_object_type(draw(object_types), choice)
            case "regex":
                mapping = mapping.set_module_name_regex(draw(regexes), choice)
            case _:
                index = draw(st.integers(-1 if invalid else 0, 2))
                mapping = mapping.set_module_name_object_type_order(draw(names), draw(object_types), index, choice)
    return mapping


BACKENDS: tuple[BackendConfig, ...] = (CPU, X86, ONEDNN, QNNPACK, TENSORRT, EXECUTORCH, FBGEMM, NATIVE)
ENGINES = ("onednn", "quantized", "reference")


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    max_nodes: int = 8,
    families: Sequence[str] = FAMILIES,
    aliasing: bool = False,
    configured: bool = False,
    invalid: bool = False,
    backends: Sequence[BackendConfig] = BACKENDS,
    engines: Sequence[str] = ENGINES,
) -> Case:
    """Models with data, backend and engine, for `qfunc.testing.check_laws`.

    With `configured` the configuration is random instead of the backend's own, with `invalid` sometimes impossible.
    Batches may be of another size than the example inputs.
    """
    model = draw(models(max_nodes=max_nodes, families=families, aliasing=aliasing))
    batches = model.batches(2, draw(st.sampled_from([None, 3])))
    backend, engine = draw(st.sampled_from(list(backends))), draw(st.sampled_from(list(engines)))
    mapping = draw(configurations(model.module, invalid=invalid)) if configured or invalid else None
    return Case(model.module, model.example_inputs, batches, backend, engine, mapping)
