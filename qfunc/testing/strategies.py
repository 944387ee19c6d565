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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from torch import nn

from qfunc.backends import CPU, EXECUTORCH, FBGEMM, NATIVE, ONEDNN, QNNPACK, TENSORRT, X86
from qfunc.config.backend_config import BackendConfig
from qfunc.config.point import Edge, values_in
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.selectors import SELECTORS
from qfunc.edge.trace import trace
from qfunc.ir import Graph, Node, TensorFact
from qfunc.numerics import observers as o
from qfunc.numerics.qparams import UINT8_REDUCED, QuantSpec
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.passes.numbers import non_tensors
from qfunc.quantize import fuse
from qfunc.testing import quantizations as w
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


_OBJECT_TYPES = ("relu", "flatten", "mean", nn.Conv2d, nn.Linear, nn.ReLU, nn.Sequential)
_WRONG_REGEXES = ("(", "[", "*", "a{2,1}")


def _ways(ways: Callable[[QuantSpec], Sequence[Any]], specs: Sequence[QuantSpec]) -> st.SearchStrategy[Any]:
    return st.sampled_from(specs).flatmap(lambda spec: st.sampled_from(ways(spec)))


_ACTIVATIONS = _ways(w.activation_ways, w.ACTIVATION_SPECS)
_INPUTS = _ACTIVATIONS.filter(lambda way: not isinstance(way, ReuseInput))
_WEIGHTS = _ways(w.weight_ways, w.WEIGHT_SPECS)
_PLACES = _ways(w.place_ways, w.PLACE_SPECS)
_WRONG = _ways(w.wrong_ways, w.WRONG_SPECS)


_OBSERVED = _ways(w.activation_observers, w.ACTIVATION_SPECS)
_OBSERVED_WEIGHTS = _ways(w.weight_observers, w.WEIGHT_SPECS)
_KINDS = (
    st.builds(QConfig, _OBSERVED, _OBSERVED_WEIGHTS, st.none() | _OBSERVED),
    st.builds(QConfig, st.sampled_from((Dynamic(), Dynamic(UINT8_REDUCED))), _OBSERVED_WEIGHTS),
    st.builds(QConfig, st.just(KeepFloat()), _OBSERVED_WEIGHTS | st.just(Cast())),
    st.builds(QConfig, st.sampled_from((Cast(), Cast(dynamic=True))), st.just(Cast())),
    st.builds(QConfig, st.just(ReuseInput()), _WEIGHTS),
    st.builds(QConfig, _ACTIVATIONS, _WEIGHTS, st.none() | _INPUTS),
)
"""Static, dynamic, of weights alone, in half the bits, with the qparams of the input; and any of these mixed."""


@st.composite
def qconfigs(draw: st.DrawFn, *, invalid: bool = False) -> QConfig:
    """How activations and weights are quantized: with observers, when the model runs, by casts, or not at all.

    With `invalid`, also configurations that are impossible: wrong specs, weights quantized when the model runs.
    """
    if invalid and draw(st.booleans()):
        some = _WRONG | st.just(o.MinMax())
        return QConfig(draw(some), draw(some), draw(st.none() | some))
    return draw(st.sampled_from(_KINDS).flatmap(lambda kind: kind))


@dataclass(frozen=True)
class _Names:
    """What the entries of a configuration can name."""

    paths: tuple[str, ...]
    types: tuple[Any, ...]
    regexes: tuple[str, ...]
    indexes: tuple[int, ...]
    selectors: tuple[Any, ...]
    operators: tuple[str, ...]
    values: tuple[str, ...]
    edges: tuple[Edge, ...]


def _names(model: nn.Module | Graph, *, invalid: bool) -> _Names:
    """The names in a model; with `invalid` others as well."""
    graph = model if isinstance(model, Graph) else trace(model).value_or(None)
    modules = {} if isinstance(model, Graph) else dict(model.named_modules(remove_duplicate=False))
    paths = sorted(model.modules if isinstance(model, Graph) else modules)
    operators, values, edges = ((), (), ()) if graph is None else _places(graph, invalid=invalid)
    wrong: dict[str, tuple[Any, ...]] = _UNKNOWN if invalid else {}
    return _Names(
        (*paths, *wrong.get("paths", ())),
        (*dict.fromkeys(map(type, modules.values())), *_OBJECT_TYPES, *wrong.get("types", ())),
        (".*", r"m\d", "m0$", "0", "", *wrong.get("regexes", ())),
        (0, 1, 2, *wrong.get("indexes", ())),
        (*SELECTORS.values(), *wrong.get("selectors", ())),
        (*operators, *wrong.get("nodes", ())),
        (*values, *wrong.get("nodes", ())),
        (*edges, *wrong.get("edges", ())),
    )


_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "paths": ("no.such.module", "m"),
    "types": (3, "", None),
    "regexes": _WRONG_REGEXES,
    "indexes": (-1,),
    "selectors": tuple(w.WRONG_SELECTORS.values()),
    "nodes": ("no_such_node", ""),
    "edges": (Edge("no_such_node", "input"), Edge("output", "no such slot"), Edge("output", "post.x.other", 2**40)),
}
"""What no model has."""


def _places(graph: Graph, *, invalid: bool) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Edge, ...]]:
    """The operators of a graph, its values and their uses: those of floats alone, unless they may be impossible."""
    numbers = non_tensors(graph)
    values = {node.id for node in graph if invalid or (node.id not in numbers and _is_float(node))}
    slots = [(node, name) for node in graph if invalid or node.kind != "output" for name, _ in node.args]
    slots += [(n, f"post.{i}.{name}") for n in graph for i, post in enumerate(n.post) for name, _ in post.args]
    uses = ((node, slot, index, used) for node, slot in slots for index, used in enumerate(values_in(node, slot)))
    return (
        tuple(node.id for node in graph if invalid or node.kind not in ("placeholder", "get_attr", "output")),
        tuple(id for id in graph.order if id in values),
        tuple(Edge(node.id, slot, index) for node, slot, index, used in uses if used in values),
    )


def _is_float(node: Node) -> bool:
    """Whether a value may be a float tensor, as far as the graph tells."""
    fact = node.fact is None or (isinstance(node.fact, TensorFact) and node.fact.dtype == "float32")
    return fact and not node.aliased and node.kind != "output"


@st.composite
def configurations(draw: st.DrawFn, model: nn.Module | Graph, *, invalid: bool = False) -> QConfigMapping:
    """Configurations of a model: entries of every strength for its own modules, types, nodes, values and uses.

    Nodes are those of a graph, or of the model as it is traced. Some entries are `None`. With `invalid`, also such that
    must be refused: unknown modules and nodes, dtypes and schemes, impossible ranges, bad regexes, broken selectors.
    """
    names = _names(model, invalid=invalid)
    choices = st.none() | qconfigs(invalid=invalid)
    places = _PLACES | _WRONG if invalid else _PLACES
    mapping = QConfigMapping().set_global(draw(qconfigs(invalid=invalid) | st.none()))
    kinds = ["module", "type", "regex", "order", "selector"]
    kinds += [kind for kind, known in (("node", names.operators), ("output", names.values)) if known]
    kinds += ["edge"] if names.edges else []

    def one(options: Sequence[Any]) -> Any:
        return draw(st.sampled_from(options))

    for _ in range(draw(st.integers(0, 3))):
        match one(kinds):
            case "module":
                mapping = mapping.set_module_name(one(names.paths), draw(choices))
            case "type":
                mapping = mapping.set_object_type(one(names.types), draw(choices))
            case "regex":
                mapping = mapping.set_module_name_regex(one(names.regexes), draw(choices))
            case "selector":
                mapping = mapping.set_selected(one(names.selectors), draw(choices))
            case "node":
                mapping = mapping.set_node(one(names.operators), draw(choices))
            case "output":
                mapping = mapping.set_output(one(names.values), draw(places))
            case "edge":
                mapping = mapping.set_edge(one(names.edges), draw(places))
            case _:
                path, form, index = one(names.paths), one(names.types), one(names.indexes)
                mapping = mapping.set_module_name_object_type_order(path, form, index, draw(choices))
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

    With `configured` the configuration is random instead of the backend's own, and names nodes of the fused graph; with
    `invalid` it is sometimes impossible.
    Batches may be of another size than the example inputs.
    """
    model = draw(models(max_nodes=max_nodes, families=families, aliasing=aliasing))
    batches = model.batches(2, draw(st.sampled_from([None, 3])))
    backend, engine = draw(st.sampled_from(list(backends))), draw(st.sampled_from(list(engines)))
    mapping = None
    if configured or invalid:
        graph = trace(model.module, model.example_inputs).bind(lambda traced: fuse(traced, backend=backend))
        mapping = draw(configurations(graph.value_or(model.module), invalid=invalid))
    return Case(model.module, model.example_inputs, batches, backend, engine, mapping)
