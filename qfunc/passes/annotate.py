"""`annotate`: what a configuration and a backend quantize in a graph, use by use and value by value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.annotation import Annotations, Edge, Point, SharedWith, Spec
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.qconfig import QConfig, QConfigMapping, problems_of, resolve_qconfigs
from qfunc.errors import BadConfig, Problem, UnsupportedDType, WrongStage, several
from qfunc.ir import Expression, Graph, Node, Note, Ref, TensorFact, refs, users
from qfunc.numerics.grid import CODE_RANGE
from qfunc.numerics.qparams import QuantSpec
from qfunc.ops import BY_NAME, KINDS
from qfunc.params import loads
from qfunc.passes.kept import kind_as_written, why_kept
from qfunc.passes.numbers import non_tensors
from qfunc.passes.unmatched import unmatched
from qfunc.result import R


def annotate(
    graph: Graph, qconfig_mapping: QConfigMapping | None = None, *, backend: BackendConfig = CPU
) -> R[Annotations]:
    """What is quantized in a graph by the rules of `backend` and the configuration.

    The operands of a quantized operator are, and its result, unless it shares its input's qparams. A value whose memory
    is changed in place, or that is not floating point, never is.

    Args:
        graph: a traced, usually fused graph.
        qconfig_mapping: what to quantize, and how; by default the backend's own.
        backend: what can be quantized.

    Returns:
        The annotations, with a note for each entry of the configuration that matches nothing; or all of: `UnknownName`
        for a module that does not exist or an unknown dtype, `BadConfig` for impossible observers, `UnsupportedDType`
        for dtypes that the backend does not list for an operator.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems = wrong_arguments(
        backend=backend, qconfig_mapping=QConfigMapping() if qconfig_mapping is None else qconfig_mapping
    )
    if problems:
        return Failure(several(problems))
    mapping = backend.qconfig_mapping if qconfig_mapping is None else qconfig_mapping
    problems = problems_of(mapping, graph.modules)
    if problems:
        return Failure(several(problems))
    rules = _Rules(graph, mapping, backend)
    if rules.problems:
        return Failure(several(rules.problems))
    asked = QConfigMapping() if qconfig_mapping is None else qconfig_mapping
    return Success(rules.annotations(unmatched(asked, graph, backend.qconfig_mapping)))


class _Rules:
    """The decisions about one graph, made in two walks: what is quantized, then how."""

    def __init__(self, graph: Graph, mapping: QConfigMapping, backend: BackendConfig) -> None:
        self.graph = graph
        self.backend = backend
        self.problems: list[Problem] = []
        self.floats: dict[str, str] = {}
        self.refused: set[str] = set()
        self._chosen: dict[str, tuple[OperatorConfig, QConfig]] = {}
        self._numbers = non_tensors(graph)
        for id, qconfig in resolve_qconfigs(mapping, graph).items():
            row = backend.operator(graph[id]) if graph[id].kind in BY_NAME else None
            if row is None:
                self._keep(graph[id], "" if qconfig is None else _hindrance(graph[id], graph, backend))
            elif qconfig is None:
                self.floats[id] = "the configuration keeps it float"
            elif self._can_quantize(graph[id], row, qconfig):
                self._chosen[id] = (row, qconfig)
        self._read_quantized = self._keep_useful() if backend.lazy else None

    def annotations(self, notes: tuple[Note, ...]) -> Annotations:
        """The decisions as a value."""
        inputs, outputs = dict[Edge, Spec](), dict[str, Spec]()
        groups: list[tuple[Point, ...]] = []
        taps: list[str] = []
        for node in (node for node in self.graph if node.id in self._chosen):
            row, qconfig = self._chosen[node.id]
            edges = [edge for edge, _ in self._operands(node)]
            inputs.update(dict.fromkeys(edges, qconfig.of_inputs))
            if self._shares(node, row):
                outputs[node.id] = SharedWith(edges[0])
                groups += [tuple(edges)] if len(edges) > 1 else []
                taps += [node.id] if self.backend.observe_shared_outputs else []
            elif self._read_quantized is None or node.id in self._read_quantized or not _can_write_float(node, row):
                outputs[node.id] = qconfig.activation if row.fixed is None else row.fixed
        weights = {id: q.weight for id, (_, q) in self._chosen.items() if _has_weight(self.graph[id])}
        tables = (pmap(inputs), pmap(outputs), pmap(weights), frozenset(groups), frozenset(taps))
        return Annotations(*tables, pmap(self.floats), frozenset(self.refused), notes)

    def _keep(self, node: Node, reason: str) -> None:
        """Keep a node float; a layer with weights that the configuration meant to quantize is `refused`."""
        self.floats[node.id] = reason or "the configuration keeps it float"
        if reason and kind_as_written(node, self.graph) in _WEIGHTED:
            self.refused.add(node.id)

    def _can_quantize(self, node: Node, row: OperatorConfig, qconfig: QConfig) -> bool:
        operands = list(self._operands(node))
        reason = ""
        if node.aliased or any(self.graph[value].aliased for _, value in operands):
            reason = "its memory is changed in place"
        elif not operands or any(_not_float(self.graph[value]) for _, value in operands):
            self.problems += _weight_problems(node)
            reason = "an operand is no floating-point tensor"
        elif "other" in BY_NAME[node.kind].tensors and not self._numeric_rest(node):
            reason = "an operand is neither a tensor nor a number"
        elif node.kind in ("add", "sub") and node.get("alpha") != 1:
            reason = "the sum is scaled by alpha"
        elif any(isinstance(node.get(name), Ref) for name in BY_NAME[node.kind].weights):
            reason = "its weight is computed by the graph"
        if reason:
            self._keep(node, reason)
            return False
        activations = dict.fromkeys(observer.spec.dtype for observer in (qconfig.of_inputs, qconfig.activation))
        dtypes = [("activation", dtype, row.dtypes.activation) for dtype in activations]
        if _has_weight(node):
            dtypes.append(("weight", qconfig.weight.spec.dtype, row.dtypes.weight))
            self.problems += [*_weight_problems(node), *_axis_problems(node, qconfig.weight.spec)]
        for what, dtype, allowed in dtypes:
            held = allowed if what == "weight" else tuple(name for name in allowed if name in CODE_RANGE)
            if dtype not in held:
                plural = {"activation": "activations", "weight": "weights"}[what]
                text = f"the {self.backend.name} backend runs it with {' or '.join(held) or 'no'} {plural}, not {dtype}"
                self.problems.append(UnsupportedDType(node.place, text))
        return True

    def _operands(self, node: Node) -> Iterator[tuple[Edge, str]]:
        """The activation operands that are tensors, with their edges."""
        for slot in BY_NAME[node.kind].tensors:
            for index, value in enumerate(refs(node.get(slot))):
                if value not in self._numbers:
                    yield Edge(node.id, slot, index), value
        for position, post in enumerate(node.post):
            for name, arg in post.args:
                for index, value in enumerate(refs(arg)):
                    yield Edge(node.id, f"post.{position}.{name}", index), value

    def _numeric_rest(self, node: Node) -> bool:
        """Whether the operands that are not tensors are plain numbers."""
        rest = [node.get(slot) for slot in ("input", "other") if not isinstance(node.get(slot), Ref)]
        refs_ok = all(v not in self._numbers for slot in ("input", "other") for v in refs(node.get(slot)))
        return refs_ok and all(isinstance(value, (int, float)) for value in rest)

    def _shares(self, node: Node, row: OperatorConfig) -> bool:
        own_divisor = node.has("divisor_override") and node.get("divisor_override") is not None
        if own_divisor and not self.backend.observe_shared_outputs:
            return False  # such an average leaves the range of what it averages, and nothing else would see it
        if row.observation is Observation.BY_TENSORS:
            return sum(1 for _ in self._operands(node)) == 1
        return row.observation is Observation.SHARED

    def _keep_useful(self) -> set[str]:
        """Drop the operators that gain nothing by running on integers; gives the values that are read quantized.

        A weighted operator always gains. Any other one must have its result read quantized; and one that computes, and
        so rounds, must have an operand that is produced quantized.
        """
        readers = users(self.graph)
        queue = list(self._chosen)
        while queue:
            id = queue.pop()
            if id in self._chosen and not self._gains(id, readers[id]):
                del self._chosen[id]
                self.floats[id] = "it gains nothing on integers here"
                queue += [*readers[id], *self.graph[id].uses()]
        return {value for id in self._chosen for _, value in self._operands(self.graph[id])}

    def _gains(self, id: str, readers: Iterable[str]) -> bool:
        node = self.graph[id]
        if _has_weight(node):
            return True
        read = any(user in self._chosen and id in self._values(user) for user in readers)
        shares = self._shares(node, self._chosen[id][0])
        return read and (shares or any(value in self._chosen for value in self._values(id)))

    def _values(self, id: str) -> list[str]:
        return [value for _, value in self._operands(self.graph[id])]


def _can_write_float(node: Node, row: OperatorConfig) -> bool:
    """Whether the operator's kernel can leave its result in float; one that adds cannot."""
    return row.float_output and all(post.kind != "add" for post in node.post)


def _has_weight(node: Node) -> bool:
    """Whether the node has a weight that is quantized."""
    return node.kind in _WEIGHTED and isinstance(node.get("weight"), Expression)


def _axis_problems(node: Node, spec: QuantSpec) -> Iterator[Problem]:
    """A channel axis that the weight does not have."""
    shape = next(loads(node.get("weight"))).shape  # type: ignore[arg-type]
    if spec.ch_axis is not None and spec.ch_axis >= len(shape):
        reason = f"ch_axis {spec.ch_axis} is no axis of its weight of shape {tuple(shape)}"
        yield BadConfig(node.place, reason, "use ch_axis=0, the axis of the output channels")


def _weight_problems(node: Node) -> Iterator[Problem]:
    """A weight that is no float32."""
    weight = node.get("weight") if _has_weight(node) else None
    dtypes = {load.dtype for load in loads(weight)} if isinstance(weight, Expression) else set()
    for dtype in sorted(dtypes - {"float32"}):
        remedy = "convert the model and its inputs with .float(), or keep the module float with set_module_name"
        yield UnsupportedDType(
            node.place, f"kernels take the place of float32 operators, its weight is {dtype}", remedy
        )


_WEIGHTED = frozenset(
    row.name for row in KINDS if "weight" in row.weights and row.name.startswith(("conv", "linear", "embedding"))
)
"""The layers whose weight is quantized; a norm's and a PReLU's are factors of single channels or elements."""


def _hindrance(node: Node, graph: Graph, backend: BackendConfig) -> str:
    """Why a node that is configured has no row of the backend's."""
    if node.aliased or kind_as_written(node, graph) != node.kind:
        return why_kept(node, graph)
    return f"the {backend.name} backend has no rule for it"


def _not_float(node: Node) -> bool:
    """Whether an example showed the value to be something else than a float32 tensor, whose place kernels take."""
    fact = node.fact
    return isinstance(fact, tuple) or (isinstance(fact, TensorFact) and fact.dtype != "float32")
