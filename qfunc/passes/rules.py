"""What a backend's rules make of the configurations of a graph's operators, use by use and value by value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

from pyrsistent import pmap

from qfunc.backends.default_mappings import is_ready_made
from qfunc.config.annotation import Annotations, SharedWith, Spec
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.point import Edge, Point, values_in
from qfunc.config.qconfig import Choice, QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import GLOBAL, Chosen, Entry, Lookup, Resolution
from qfunc.config.training import trained
from qfunc.errors import Problem, UnsupportedDType
from qfunc.ir import Arg, Expression, Graph, Node, Ref, refs, users
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.observers import MinMax
from qfunc.numerics.unmeasured import UNMEASURED, Cast, Dynamic, KeepFloat, Quantization, ReuseInput
from qfunc.ops import WEIGHTED
from qfunc.ops.shapes import PARTS
from qfunc.passes.exceptions import float_because
from qfunc.passes.kept import kind_as_written, why_kept
from qfunc.passes.numbers import non_tensors
from qfunc.passes.roles import (
    along_outputs,
    axis_problems,
    can_write_float,
    computes_weight,
    has_weight,
    inputs_of,
    is_not_float,
    weight_problems,
    weight_slot,
)

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a whole graph: the values that are no tensors, and the nodes that read each value."""

    numbers: AbstractSet[str]
    readers: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(graph: Graph) -> Surroundings:
        """Those of a graph."""
        return Surroundings(non_tensors(graph), users(graph))


class Rules:
    """The decisions about one graph, or the nodes `own` of it, made in two walks: what is quantized, then how.

    The names of modules in the mapping of `lookup` are relative to `base`; `surroundings` are those of the whole graph.
    `demanded` values are read quantized from outside; `claimed` nodes are for others to decide about.
    """

    def __init__(
        self,
        graph: Graph,
        lookup: Lookup,
        backend: BackendConfig,
        surroundings: Surroundings,
        *,
        base: str = "",
        own: tuple[str, ...] | None = None,
        demanded: frozenset[str] = frozenset(),
        claimed: frozenset[str] = frozenset(),
    ) -> None:
        self.backend = backend
        self.mapping = lookup.mapping
        resolution = Resolution(lookup, graph, self.is_default, base=base, own=own)
        self.resolution = resolution
        self.lookup = lookup
        self.graph = graph
        self.fits: set[tuple[Entry, bool]] = set()
        """The entries whose dtypes suit some operator, with and without a weight."""
        self.problems: list[Problem] = [*lookup.problems, *resolution.problems]
        self.floats: dict[str, str] = {}
        self.refused: set[str] = set()
        self.turned: list[str] = []
        """The transposed convolutions whose weights have scales along axis 1 where the configuration says 0."""
        self._chosen: dict[str, tuple[OperatorConfig, QConfig]] = {}
        self._misfits: dict[tuple[Entry, bool], list[Problem]] = {}
        self._demanded = demanded
        self._surroundings = surroundings
        self._numbers = surroundings.numbers
        self.base = base
        self.own: AbstractSet[str] = resolution.chosen.keys()
        for id, chosen in resolution.chosen.items():
            if id not in claimed:
                self._decide(graph[id], chosen)
        self._read_quantized = self._keep_useful() if backend.lazy else None

    def annotations(self) -> Annotations:
        """The decisions as a value, without what `with_places` adds of the mapping's single values and uses.

        A result that reuses the qparams of its input is for `with_reused` to decide about.
        """
        inputs, outputs, floats = dict[Edge, Spec](), dict[str, Spec](), dict(self.floats)
        groups: list[tuple[Point, ...]] = []
        taps: list[str] = []
        for id, (row, qconfig) in self._chosen.items():
            node = self.graph[id]
            operands = self._quantized_operands(node, qconfig)
            free = [(edge, value) for edge, value in operands if not self._overridden(edge, value)]
            edges = [edge for edge, _ in free]
            if isinstance(qconfig.activation, ReuseInput):
                continue
            given = qconfig.of_inputs
            inputs.update(pair for edge, value in free for pair in _at(edge, self._of(value, given)))
            if self._shares(node, row) and not isinstance(given, (Cast, Dynamic, KeepFloat)):
                shared = edges or [edge for edge, _ in operands if _has_qparams(self.mapping.edges.get(edge))]
                if shared:
                    outputs[node.id] = SharedWith(shared[0])
                    groups += [tuple(edges)] if len(edges) > 1 else []
                    taps += [node.id] if self.backend.observe_shared_outputs else []
                else:
                    floats[node.id] = "its input, whose qparams it is to share, is kept float"
            elif self._read_quantized is None or node.id in self._read_quantized or not can_write_float(node, row):
                outputs.update(_at(node.id, _fixed(row, qconfig.of_output) or qconfig.of_output))
            inputs.update(self._computed_weight(node, row, qconfig))
        weights = {id: q.weight for id, (row, q) in self._chosen.items() if has_weight(self.graph[id], row)}
        biases = {id: q.weight for id, (row, q) in self._chosen.items() if self._casts_bias(id, row, q)}
        return Annotations(
            pmap(inputs),
            pmap(outputs),
            pmap({id: weight for id, weight in weights.items() if not isinstance(weight, KeepFloat)}),
            frozenset(groups),
            frozenset(taps),
            pmap(floats),
            frozenset(self.refused),
            biases=pmap(biases),
        )

    def without_places(self) -> Rules:
        """These decisions by the same configuration without its entries for single values and uses."""
        bare = copy(self)
        bare.mapping = replace(self.mapping, outputs=pmap(), edges=pmap())
        return bare

    def reusing(self) -> Iterator[tuple[str, tuple[Edge, str] | None]]:
        """The nodes whose results reuse the qparams of an input, with the use of it and its value, if there is one."""
        for id, (row, qconfig) in self._chosen.items():
            if isinstance(qconfig.activation, ReuseInput):
                yield id, next(self._operands(self.graph[id], row), None)

    def reads_quantized(self, value: str) -> bool:
        """Whether a value that is not one of a backend's operators is to be quantized for all that read it."""
        return self._read_quantized is None or value in self._read_quantized or value in self._demanded

    def _decide(self, node: Node, chosen: Chosen) -> None:
        row, qconfig = self.backend.operator(node), self._with_inputs(chosen.qconfig)
        if qconfig is not None and self.backend.lazy and chosen.entry[0] in ("global_qconfig", "object_types"):
            turned = along_outputs(node, qconfig)
            self.turned += [node.id] if turned is not qconfig else []
            qconfig = turned
        if node.kind in PARTS and row is None:
            self.floats[node.id] = "its parts are read in float"
        elif row is None:
            self._keep(node, "" if qconfig is None else _hindrance(node, self.graph, self.backend))
        elif qconfig is None:
            self.floats[node.id] = "the configuration keeps it float"
        elif self._observation(node, row) is Observation.NOT_OBSERVED:
            self.floats[node.id] = f"the {self.backend.name} backend observes nothing of it"
        elif self._can_quantize(node, row, qconfig):
            misfit = self._misfit(node, row, qconfig)
            key = (chosen.entry, weight_slot(node, row) is not None)
            if misfit:
                self._misfits.setdefault(key, []).append(UnsupportedDType(node.place, misfit))
                self._keep(node, misfit, meant=not self._is_default(chosen.entry))
            else:
                self.fits.add(key)
                self._chosen[node.id] = (row, qconfig)

    def _with_inputs(self, qconfig: Choice) -> Choice:
        """A configuration whose known range is that of its output alone: it would clip the inputs."""
        if qconfig is None or qconfig.input_activation is not None or not is_fixed(qconfig.activation):
            return qconfig
        default = self.mapping.global_qconfig
        given = None if default is None or is_fixed(default.of_inputs) else default.of_inputs
        return replace(qconfig, input_activation=given or MinMax(qconfig.activation.spec))  # type: ignore[union-attr]

    def _keep(self, node: Node, reason: str, *, meant: bool = True) -> None:
        """Keep a node float; a layer with weights that the configuration meant to quantize is `refused`."""
        self.floats[node.id] = reason or "the configuration keeps it float"
        if meant and reason and kind_as_written(node, self.graph) in WEIGHTED:
            self.refused.add(node.id)

    def useless_entries(self, fits: AbstractSet[tuple[Entry, bool]]) -> Iterator[Problem]:
        """The problems of entries whose dtypes suit no layer they name, or nothing at all that they name.

        One that suits some, as `fits` says, leaves the others float: dynamic quantization is for linear layers, say,
        not convolutions.
        """
        for (entry, weighted), problems in self._misfits.items():
            suits = {(entry, True)} if weighted else {(entry, True), (entry, False)}
            if not suits & fits and not self._is_default(entry):
                yield from problems

    def _is_default(self, entry: Entry) -> bool:
        """Whether it is an entry of a default configuration, which is meant for any model."""
        if entry == GLOBAL:
            own = self.backend.qconfig_mapping.global_qconfig
            return self.mapping.global_qconfig in (own, trained(own), trained(own, learned=True))
        field, key = entry
        return field == "object_types" and self.is_default(key, self.mapping.object_types[key])

    def is_default(self, form: str, qconfig: Choice) -> bool:
        """Whether an entry by type is one of the backend's own, or of another default configuration."""
        own = self.backend.qconfig_mapping.object_types
        if form in own and qconfig in (own[form], *(trained(own[form], learned=learned) for learned in (False, True))):
            return True
        return is_ready_made(form, qconfig)

    def _misfit(self, node: Node, row: OperatorConfig, qconfig: QConfig) -> str:
        """Why no combination of dtypes that the operator takes is the configured one; empty where one is."""
        weighted = weight_slot(node, row) is not None
        found = [dtypes.misfit(qconfig, weighted=weighted, output=row.fixed) for dtypes in row.dtypes]
        if not all(found):
            return ""
        taken = " or ".join(dict.fromkeys(map(str, row.dtypes)))
        told = f"the {self.backend.name} backend runs it with {taken}, not with {found[0]}"
        if all(dtypes.is_dynamic for dtypes in row.dtypes):
            return f"{told}: configure it as qfunc.backends.default_mappings.DYNAMIC does"
        if weighted and all(dtypes.input_dtype == "float32" for dtypes in row.dtypes):
            return f"{told}: configure it with qfunc.backends.qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY"
        return told

    def _can_quantize(self, node: Node, row: OperatorConfig, qconfig: QConfig) -> bool:
        operands = list(self._operands(node, row))
        reason = ""
        if node.aliased or any(self.graph[value].aliased for _, value in operands):
            reason = "its memory is changed in place"
        elif (inputs_of(node, row) and not operands) or any(
            is_not_float(self.graph[value]) for _, value in operands if _quantizes(qconfig)
        ):
            self.problems += weight_problems(node, row)
            reason = "an operand is no floating-point tensor"
        elif self.backend.lazy and (exception := float_because(node, self.graph)):
            reason = exception
        elif "other" in inputs_of(node, row) and not self._numeric_rest(node):
            reason = "an operand is neither a tensor nor a number"
        elif node.kind in ("add", "sub") and not self._scales(node.get("alpha")):
            reason = "the sum is scaled by alpha"
        elif self.backend.lazy and computes_weight(node, row):
            reason = "its weight is computed by the graph"
        if reason:
            self._keep(node, reason)
            return False
        if has_weight(node, row):
            spec = getattr(qconfig.weight, "spec", None)
            self.problems += [*weight_problems(node, row), *(axis_problems(node, row, spec) if spec else ())]
        return True

    def _scales(self, alpha: Arg) -> bool:
        """Whether the backend's kernels scale a summand by this; the reference's drop it."""
        return alpha == 1 or (self.backend.lazy and isinstance(alpha, (int, float)))

    def _operands(self, node: Node, row: OperatorConfig) -> Iterator[tuple[Edge, str]]:
        """The activation operands that are tensors, with their edges."""
        for slot in inputs_of(node, row):
            for index, value in enumerate(values_in(node, slot)):
                whole = self.graph[value]
                if whole.kind in PARTS and isinstance(whole.get("input"), Ref):
                    # a part has the range of the whole, which is quantized before it is divided
                    yield Edge(value, "input"), next(whole.uses())
                elif value not in self._numbers:
                    yield Edge(node.id, slot, index), value
        for position, post in enumerate(node.post):
            for name, arg in post.args:
                for index, value in enumerate(refs(arg)):
                    yield Edge(node.id, f"post.{position}.{name}", index), value

    def _quantized_operands(self, node: Node, qconfig: QConfig) -> list[tuple[Edge, str]]:
        """Those that are quantized: when that is done as the model runs, the first alone."""
        operands = list(self._operands(node, self._chosen[node.id][0]))
        return operands[:1] if qconfig.is_dynamic else operands

    def _of(self, value: str, given: Quantization) -> Quantization:
        """How a value is quantized where it is used: with the range of the function that gives it, if that is known."""
        row = self.backend.operator(self.graph[value]) if self.backend.lazy else None
        if row is None or row.fixed is None or isinstance(given, UNMEASURED):
            return given
        return _fixed(row, given) or given if given.spec == row.fixed.spec else given

    def _overridden(self, edge: Edge, value: str) -> bool:
        """Whether the configuration says something of its own about a use."""
        return edge in self.mapping.edges or isinstance(self.mapping.outputs.get(value), KeepFloat)

    def source(self, edge: Edge, value: str) -> Point | None:
        """Where the qparams of an operand are, if it is quantized: at the use of it, or at its value."""
        if edge in self.mapping.edges:
            return edge if _has_qparams(self.mapping.edges[edge]) else None
        return None if self._overridden(edge, value) else value

    def _computed_weight(self, node: Node, row: OperatorConfig, qconfig: QConfig) -> tuple[tuple[Edge, Spec], ...]:
        """A weight that the graph computes is quantized where it is used, like an activation."""
        slot = weight_slot(node, row)
        if slot is None or not computes_weight(node, row) or qconfig.is_dynamic:
            return ()
        edge = Edge(node.id, slot)
        return () if edge in self.mapping.edges else _at(edge, qconfig.weight)

    def _casts_bias(self, id: str, row: OperatorConfig, qconfig: QConfig) -> bool:
        """A bias is float16 where all the rest is."""
        node, slot = self.graph[id], row.bias or "bias"
        static = isinstance(qconfig.activation, Cast) and not qconfig.is_dynamic
        casts = static and isinstance(qconfig.weight, Cast) and weight_slot(node, row) is not None
        return casts and node.has(slot) and isinstance(node.get(slot), Expression)

    def _numeric_rest(self, node: Node) -> bool:
        """Whether the operands that are not tensors are plain numbers."""
        rest = [node.get(slot) for slot in ("input", "other") if not isinstance(node.get(slot), Ref)]
        refs_ok = all(v not in self._numbers for slot in ("input", "other") for v in refs(node.get(slot)))
        return refs_ok and all(isinstance(value, (int, float)) for value in rest)

    def _observation(self, node: Node, row: OperatorConfig) -> Observation:
        """How the output is quantized, with so many tensors among its operands."""
        count = sum(1 for _ in self._operands(node, row)) if row.by_tensor_count else 0
        return dict(row.by_tensor_count).get(count, row.observation)

    def _shares(self, node: Node, row: OperatorConfig) -> bool:
        own_divisor = node.has("divisor_override") and node.get("divisor_override") is not None
        if own_divisor and not self.backend.observe_shared_outputs:
            return False  # such an average leaves the range of what it averages, and nothing else would see it
        return self._observation(node, row) is Observation.SHARED

    def _keep_useful(self) -> frozenset[str]:
        """Drop the operators that gain nothing by running on integers; gives the values that are read quantized.

        A weighted operator always gains. Any other one must have its result read quantized; and one that computes, and
        so rounds, or that narrows the range, must have an operand that is produced quantized.
        """
        values = {id: frozenset(self._values(id)) for id in self._chosen}
        readers: dict[str, list[str]] = {}
        for id, operands in values.items():
            for value in operands:
                readers.setdefault(value, []).append(id)
        weighted = {id for id, (row, _) in self._chosen.items() if has_weight(self.graph[id], row)}
        shares = {
            id
            for id, (row, qconfig) in self._chosen.items()
            if self._shares(self.graph[id], row) and not (row.narrows and _has_qparams(qconfig.of_inputs))
        }
        read = Counter(value for id in values for value in values[id])
        made = {id: sum(value in values for value in values[id]) for id in values}
        queue = list(self._chosen)
        while queue:
            id = queue.pop()
            useful = (id in self._demanded or read[id]) and (id in shares or made.get(id))
            if id not in self._chosen or id in weighted or useful:
                continue
            del self._chosen[id]
            self.floats[id] = "it gains nothing on integers here"
            read.subtract(values[id])
            above = readers.get(id, [])
            for user in above:
                made[user] -= 1
            queue += [*above, *values[id]]
        return self._demanded.union(value for id in self._chosen for value in values[id])

    def _values(self, id: str) -> list[str]:
        row, qconfig = self._chosen[id]
        if not _quantizes(qconfig) or qconfig.is_dynamic:
            return []  # what is quantized as the model runs is read in float
        return [value for _, value in self._operands(self.graph[id], row)]


def with_places(annotations: Annotations, mapping: QConfigMapping) -> Annotations:
    """The annotations with a mapping's entries for single values and uses, which are stronger than all else."""
    if not (mapping.outputs or mapping.edges):
        return annotations
    inputs, outputs = dict(annotations.inputs), dict(annotations.outputs)
    for edge, spec in mapping.edges.items():
        inputs.update(_at(edge, spec))
    for id, spec in mapping.outputs.items():
        outputs.pop(id, None)
        outputs.update(_at(id, spec))
    taps = frozenset(tap for tap in annotations.taps if tap not in mapping.outputs)
    kept = frozenset(edge for edge, spec in mapping.edges.items() if isinstance(spec, KeepFloat))
    unrounded = annotations.unrounded | kept
    return replace(annotations, inputs=pmap(inputs), outputs=pmap(outputs), taps=taps, unrounded=unrounded)


def with_reused(
    annotations: Annotations, rules: Iterable[Rules], order: Iterable[str], also: AbstractSet[str]
) -> Annotations:
    """The annotations with the results that reuse the qparams of their input, where that has any.

    `also` are values that will have qparams beside those that are annotated.
    """
    reusing = {
        id: (rule, operand) for rule in rules for id, operand in rule.reusing() if id not in rule.mapping.outputs
    }
    if not reusing:
        return annotations
    outputs, taps, floats = dict(annotations.outputs), set(annotations.taps), dict(annotations.floats)
    for id in (id for id in order if id in reusing):
        rule, operand = reusing[id]
        source = None if operand is None else rule.source(*operand)
        if source is None or (isinstance(source, str) and source not in outputs and source not in also):
            floats[id] = "its input, whose qparams it is to reuse, is not quantized"
        else:
            outputs[id] = SharedWith(source)
            taps |= {id} if rule.backend.observe_shared_outputs else set()
    return replace(annotations, outputs=pmap(outputs), taps=frozenset(taps), floats=pmap(floats))


def _at(point: P, quantization: Quantization) -> tuple[tuple[P, Spec], ...]:
    """A point and how it is quantized, or nothing where it is not."""
    return () if isinstance(quantization, (KeepFloat, ReuseInput)) else ((point, quantization),)


def _fixed(row: OperatorConfig, given: Quantization) -> Quantization | None:
    """The known qparams of an operator's result, if it has some; in training they are rounded to."""
    if row.fixed is None:
        return None
    return FakeQuantize(row.fixed) if isinstance(given, FakeQuantize) else row.fixed


def _has_qparams(quantization: Quantization | None) -> bool:
    return not isinstance(quantization, (*UNMEASURED, type(None)))


def _quantizes(qconfig: QConfig) -> bool:
    """Whether the operands are quantized, and not the weight alone."""
    return not isinstance(qconfig.of_inputs, KeepFloat)


def _hindrance(node: Node, graph: Graph, backend: BackendConfig) -> str:
    """Why a node that is configured has no row of the backend's."""
    if node.aliased or kind_as_written(node, graph) != node.kind:
        return why_kept(node, graph)
    return f"the {backend.name} backend has no rule for it"
