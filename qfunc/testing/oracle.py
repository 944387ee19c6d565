"""The system that qfunc replaces, as an oracle: torch.ao's FX graph mode, for tests of parity.

This is the only module of qfunc that may import torch.ao, and it does so inside its functions: it works as long as
torch ships torch.ao, and `available` says whether it does. Every function leaves its arguments as they were.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from qfunc.config.backend_config import Observation
from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints
from qfunc.match import MatchAllNode

QParams: TypeAlias = tuple[tuple[float, ...], tuple[int, ...]]
"""(scales, zero points): one of each per tensor, or one per channel."""

_EXPECTED_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("torch.ao.quantization is deprecated", DeprecationWarning),
    ("torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor creation", UserWarning),
    ("Please use quant_min and quant_max to specify the range for observers", UserWarning),
    ("must run observer before calling calculate_qparams", UserWarning),
    ("Default qconfig of oneDNN backend with reduce_range of false", UserWarning),
)


@dataclass(frozen=True, slots=True)
class Observed:
    """A value of a prepared model that has an observer.

    `shared` names all values that have this same observer, so that the values of one group have equal qparams;
    `qparams` is None for an observer that does not compute any (a placeholder).
    """

    value: str
    observer: str
    dtype: torch.dtype
    qparams: QParams | None
    shared: tuple[str, ...]


def available() -> bool:
    """Whether this torch has torch.ao's FX graph mode."""
    try:
        return find_spec("torch.ao.quantization.quantize_fx") is not None
    except ModuleNotFoundError:
        return False


def engines() -> tuple[str, ...]:
    """The engines that torch's quantized operators have on this machine."""
    return tuple(name for name in torch.backends.quantized.supported_engines if name != "none")


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Make `name` the engine of torch's quantized operators while the block runs (a setting of the whole process)."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch.ao gives about itself; all others pass."""
    with warnings.catch_warnings():
        for message, category in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def fuse(model: nn.Module, *, qat: bool = False, **options: Any) -> fx.GraphModule:
    """`fuse_fx`: fused for evaluation, or with `qat` as `prepare_qat_fx` fuses. `options` are its own."""
    with _quiet():
        from torch.ao.quantization.fx.fuse import fuse as fuse_traced
        from torch.ao.quantization.quantize_fx import fuse_fx

        if qat:
            return fuse_traced(fx.symbolic_trace(copy.deepcopy(model)), is_qat=True, **options)
        return fuse_fx(copy.deepcopy(model), **options)


BACKENDS = ("native", "fbgemm", "x86", "qnnpack", "onednn", "tensorrt", "executorch")
"""The names of torch.ao's backends."""


def backend_config(name: str) -> Any:
    """The `BackendConfig` of one of `BACKENDS`."""
    with _quiet():
        import_module("torch.ao.quantization.quantize_fx")  # before it, some of the others fail to import
        tables = import_module(f"torch.ao.quantization.backend_config.{name}")
        return getattr(tables, f"get_{name}_backend_config")()


def fusion_patterns(backend: str) -> tuple[Any, ...]:
    """What a backend fuses: trees `(operator, operand, ...)` of classes and functions; a leaf is given one value.

    `qfunc.match.MatchAllNode` stands for a value that is no part of the match.
    """
    with _quiet():
        from torch.ao.quantization.utils import MatchAllNode as AnyNode

        def translated(pattern: Any) -> Any:
            if isinstance(pattern, tuple):
                return tuple(map(translated, pattern))
            return MatchAllNode if pattern is AnyNode else pattern

        table = backend_config(backend)._pattern_complex_format_to_config
        return tuple(translated(pattern) for pattern, row in table.items() if row.fuser_method is not None)


@dataclass(frozen=True, slots=True)
class ListedOperator:
    """A single operator of a backend's table: a class, a function, or the name of a method or an attribute.

    `by_tensor_count` and `dtypes` are in qfunc's terms; `positions` says which arguments are what.
    """

    operator: Any
    observation: Observation
    by_tensor_count: tuple[tuple[int, Observation], ...]
    dtypes: tuple[DTypeConfig, ...]
    positions: tuple[tuple[str, int], ...]


def operator_patterns(backend: str) -> tuple[ListedOperator, ...]:
    """What a backend quantizes one by one; what torch.ao's own fused and training modules do is left out."""
    found = []
    for pattern, row in backend_config(backend)._pattern_complex_format_to_config.items():
        own = isinstance(pattern, type) and pattern.__module__.startswith("torch.ao.")
        if not isinstance(pattern, tuple) and not own:
            counts = row._num_tensor_args_to_observation_type
            found.append(
                ListedOperator(
                    pattern,
                    _observation(row.observation_type),
                    tuple((count, _observation(kind)) for count, kind in counts.items()),
                    tuple(map(_dtypes, row.dtype_configs)),
                    tuple(row._input_type_to_index.items()),
                )
            )
    return tuple(found)


def _observation(observation_type: Any) -> Observation:
    return {
        "OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT": Observation.OWN,
        "OUTPUT_SHARE_OBSERVER_WITH_INPUT": Observation.SHARED,
        "INPUT_OUTPUT_NOT_OBSERVED": Observation.NOT_OBSERVED,
    }[observation_type.name]


def _dtypes(config: Any) -> DTypeConfig:
    parts = (config.input_dtype_with_constraints, config.output_dtype_with_constraints)
    value, result, weight = (_constraints(part) for part in (*parts, config.weight_dtype_with_constraints))
    return DTypeConfig(value, result, weight, dtype_name(config.bias_dtype), bool(config.is_dynamic))


def _constraints(given: Any) -> DTypeWithConstraints | str | None:
    name = dtype_name(given.dtype)
    names = (field.name for field in fields(DTypeWithConstraints) if field.name != "dtype")
    bounds = {bound: getattr(given, bound) for bound in names}
    bare = name is None or all(bound is None for bound in bounds.values())
    return name if bare else DTypeWithConstraints(name, **bounds)  # type: ignore[arg-type]


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """A dtype by the name that qfunc has for it: a quantized one's is that of its codes.

    >>> dtype_name(torch.float16), dtype_name(torch.quint8), dtype_name(torch.quint4x2)
    ('float16', 'uint8', 'uint4')
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    return {"quint8": "uint8", "qint8": "int8", "qint32": "int32", "quint4x2": "uint4"}.get(name, name)


def fuse_modules(
    model: nn.Module, modules_to_fuse: list[str] | list[list[str]], *, qat: bool = False, **options: Any
) -> nn.Module:
    """`fuse_modules`, or `fuse_modules_qat`: the eager fusion of listed modules. `options` are its own."""
    with _quiet():
        from torch.ao.quantization import fuse_modules as evaluated
        from torch.ao.quantization import fuse_modules_qat as trained

        function: Any = trained if qat else evaluated
        fused: nn.Module = function(copy.deepcopy(model), modules_to_fuse, **options)
        return fused


def prepare(
    model: nn.Module, example_inputs: tuple[object, ...], mapping: Any = "x86", **options: Any
) -> fx.GraphModule:
    """`prepare_fx` with a `QConfigMapping`, or the default one of the named backend. `options` are its own."""
    with _quiet():
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_fx

        chosen = get_default_qconfig_mapping(mapping) if isinstance(mapping, str) else mapping
        return prepare_fx(copy.deepcopy(model), chosen, example_inputs, **options)


def equalized_layers(model: nn.Module, example_inputs: tuple[object, ...]) -> frozenset[str]:
    """The modules whose inputs `prepare_fx` measures for equalization, with its default configuration of that."""
    with _quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cannot equalize", category=UserWarning)
        from torch.ao.quantization import QConfigMapping
        from torch.ao.quantization.fx._equalize import default_equalization_qconfig

        quantization: Any = default_equalization_qconfig
        chosen = QConfigMapping().set_global(quantization)
        prepared = prepare(model, example_inputs, _equalization_config=chosen)
        sites = [node for node in prepared.graph.nodes if "equalization_process" in node.name]
        return frozenset(str(user.target) for site in sites for user in site.users if user.op == "call_module")


def calibrate(prepared: fx.GraphModule, batches: Iterable[tuple[object, ...]]) -> fx.GraphModule:
    """A copy of `prepared` whose observers have seen `batches`, each a tuple of positional inputs."""
    observed = copy.deepcopy(prepared)
    with _quiet(), torch.no_grad():
        for batch in batches:
            observed(*batch)
    return observed


def convert(prepared: fx.GraphModule, backend: str = "x86", **options: Any) -> fx.GraphModule:
    """`convert_fx`: the quantized model, its weights packed for the engine `backend`. `options` are its own."""
    with _quiet(), engine(backend):
        from torch.ao.quantization.quantize_fx import convert_fx

        return convert_fx(copy.deepcopy(prepared), **options)


def reference(prepared: fx.GraphModule, **options: Any) -> fx.GraphModule:
    """`convert_to_reference_fx`: float operators between quantize and dequantize. `options` are its own."""
    with _quiet():
        from torch.ao.quantization.quantize_fx import convert_to_reference_fx

        return convert_to_reference_fx(copy.deepcopy(prepared), **options)


def decomposed(prepared: fx.GraphModule) -> fx.GraphModule:
    """The same in `quantized_decomposed` operators; weights stay in modules, which quantize them in their forward."""
    with _quiet():
        from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx

        return _convert_to_reference_decomposed_fx(copy.deepcopy(prepared))


def quantize(
    model: nn.Module, batches: Iterable[tuple[object, ...]], backend: str = "x86", **options: Any
) -> fx.GraphModule:
    """Prepared with the default mapping of `backend`, calibrated and converted. `options` are `prepare_fx`'s."""
    collected = list(batches)
    return convert(calibrate(prepare(model, collected[0], backend, **options), collected), backend)


def observed_values(prepared: fx.GraphModule) -> frozenset[Observed]:
    """All values of a prepared model that have an observer, under the names of the nodes that compute them."""
    groups: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    for node in prepared.graph.nodes:
        if node.op == "call_module" and _is_observer(module := prepared.get_submodule(node.target)):
            groups[id(module)].append((node.args[0].name, module))
    found = []
    for members in groups.values():
        shared = tuple(sorted({name for name, _ in members}))
        found += [Observed(n, type(m).__name__, m.dtype, _qparams(m), shared) for n, m in members]
    return frozenset(found)


def observer_qparams(prepared: fx.GraphModule) -> dict[str, QParams]:
    """The qparams of every observed value, by the name of its node; placeholders are left out."""
    return {o.value: o.qparams for o in sorted(observed_values(prepared), key=_order) if o.qparams is not None}


def weight_qparams(converted: fx.GraphModule) -> dict[str, QParams]:
    """The qparams of the weights of a `reference` model's modules, by the dotted names these had in the float model."""
    modules = dict(converted.named_modules())
    found = {}
    for name, module in modules.items():
        if isinstance(getattr(module, "weight_scale", None), Tensor):
            parent = name.rpartition(".")[0]
            fused = type(modules[parent]).__module__.startswith("torch.ao.nn.intrinsic")
            part: Any = module
            found[parent if fused else name] = _plain(part.weight_scale, part.weight_zero_point)
    return found


def _order(observed: Observed) -> tuple[str, str]:
    return observed.value, observed.observer


def _is_observer(module: nn.Module) -> bool:
    with _quiet():
        from torch.ao.quantization import FakeQuantizeBase, ObserverBase

        return isinstance(module, (ObserverBase, FakeQuantizeBase))


def _qparams(observer: Any) -> QParams | None:
    if type(observer).__name__ in {"PlaceholderObserver", "NoopObserver", "ReuseInputObserver", "RecordingObserver"}:
        return None
    with _quiet():
        return _plain(*observer.calculate_qparams()[:2])


def _plain(scale: Tensor, zero_point: Tensor) -> QParams:
    return tuple(scale.reshape(-1).tolist()), tuple(zero_point.reshape(-1).tolist())


@dataclass(frozen=True, slots=True)
class ObserverData:
    """What a torch.ao observer, or what it calls a fake quantizer, is told: its class and its numbers.

    `reduce_range` is part of `quant_max`; what a class does not have is None. `trains` says that values are rounded
    while the model trains, `fused` that torch's fused operator does it.
    """

    name: str
    dtype: str | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    qscheme: str | None = None
    ch_axis: int | None = None
    eps: float | None = None
    averaging_constant: float | None = None
    bins: int | None = None
    scale: float | None = None
    zero_point: int | None = None
    is_dynamic: bool = False
    trains: bool = False
    fused: bool = False


def observer_data(constructor: Any) -> ObserverData:
    """The data of what a constructor makes, as a `QConfig` of torch.ao's holds them."""
    with _quiet():
        made = constructor()
        trains = hasattr(made, "activation_post_process")
        observer = made.activation_post_process if trains else made
        numbers = {"scale", "zero_point", "eps"}
        given = {field.name: getattr(observer, field.name, None) for field in fields(ObserverData)[2:-3]}
        qscheme = given["qscheme"]
        plain: dict[str, Any] = {
            key: float(value) if key in numbers and value is not None else value for key, value in given.items()
        }
        plain["qscheme"] = None if qscheme is None else str(qscheme).removeprefix("torch.")
        name, dtype = type(observer).__name__, dtype_name(getattr(observer, "dtype", None))
        dynamic = bool(getattr(made, "is_dynamic", False))
        fused = type(made).__name__ == "FusedMovingAvgObsFakeQuantize"
        return ObserverData(name, dtype, **plain, is_dynamic=dynamic, trains=trains, fused=fused)


def named_observers() -> dict[str, Any]:
    """All public names of torch.ao's observer module: classes, constructors and functions."""
    with _quiet():
        module = import_module("torch.ao.quantization.observer")
        return {name: getattr(module, name) for name in module.__all__}


def named_qconfigs() -> dict[str, Any]:
    """The configurations that torch.ao has under public names of their own."""
    with _quiet():
        module = import_module("torch.ao.quantization.qconfig")
        found = {name: getattr(module, name) for name in module.__all__}
        return {name: value for name, value in found.items() if isinstance(value, module.QConfig)}


def default_mapping(backend: str, *, qat: bool = False, version: int | None = None) -> Any:
    """`get_default_qconfig_mapping`, or that for training; "symmetric_qnnpack" is torch.ao's private one of XNNPACK."""
    with _quiet():
        module = import_module("torch.ao.quantization.qconfig_mapping")
        if backend == "symmetric_qnnpack":
            return getattr(module, f"_get_symmetric_qnnpack{'_qat' if qat else ''}_qconfig_mapping")()
        function = getattr(module, f"get_default{'_qat' if qat else ''}_qconfig_mapping")
        return function(backend, *([] if version is None else [version]))


def quantize_dynamically(model: nn.Module) -> nn.Module:
    """`quantize_dynamic` of the eager mode: linear and recurrent layers with int8 weights, one scale a matrix."""
    with _quiet(), engine("x86"):
        from torch.ao.quantization import quantize_dynamic

        kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
        quantized: Any = quantize_dynamic
        holder = quantized(nn.Sequential(copy.deepcopy(model)), kinds)
        found: nn.Module = holder[0]
        return found
