"""`lower`: from the reference form to the kernels of an engine, with a certificate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.config.arguments import wrong_arguments
from qfunc.config.certificate import Certificate, Entry, Form
from qfunc.config.host_report import Consulted, HostReport, Verdict
from qfunc.config.kernel import ISLAND, Call, Engine, KernelRow, Operand, Plan
from qfunc.engines import ENGINES
from qfunc.engines.choice import AUTO, best_engine, runnable
from qfunc.engines.dynamic import ATEN_KERNELS, FLOAT_KERNELS, LINEAR_DYNAMIC
from qfunc.engines.own import OwnKernelError, guarded, is_own, misplaced, objects_of
from qfunc.errors import EngineMissing, NotLowered, Problem, UnknownName, WrongStage, several
from qfunc.ir import Draft, Expression, Graph, Name, Node, Note, TensorFact, refs, users
from qfunc.ir.node import fact_in
from qfunc.numerics.grid import Affine, Grid
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.ops import BY_NAME
from qfunc.passes.certificate import CHANGES_OF_SCALE, certified
from qfunc.passes.moves import affine_of, moved_on_codes
from qfunc.passes.numbers import non_tensors
from qfunc.passes.record import recorded
from qfunc.passes.stages import Converted
from qfunc.passes.work import dtype_of, multiply_adds
from qfunc.result import R

CONVERSIONS = frozenset({"quantize", "dequantize", "quantize_dynamically", "cast"})
"""The kinds of nodes that `convert` inserts."""

_BORDERS = CONVERSIONS | {own for engine in ENGINES.values() for _, own in engine.conversions}
_ALL_CONVERSIONS = _BORDERS | CHANGES_OF_SCALE


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph of kernels, and the certificate that says what runs where."""

    graph: Graph
    certificate: Certificate
    engine: str
    host: HostReport = field(repr=False)
    input_qparams: PMap[str, Any] = pmap()
    """The qparams of the inputs that are codes, by the ids of their nodes."""
    output_qparams: PMap[int, Any] = pmap()
    """The qparams of the items of the output that are codes, by position."""
    original_weights: PMap[str, PMap[str, Expression]] | None = None
    """Those of the converted stage."""

    __hash__ = None  # type: ignore[assignment]


def lower(
    converted: Converted,
    host: HostReport,
    *,
    engine: str = "onednn",
    kernels: tuple[KernelRow, ...] = (),
    strict: bool = False,
) -> R[Lowered]:
    """The graph in which every operator between `dequantize` and `quantize` that has a kernel is that kernel.

    An operator keeps its float form, between its conversions, when the engine has no kernel for it or the kernel fails
    its contract on the host; the certificate says why. A weight is limited where the host's kernels would overflow.

    Args:
        converted: the reference form.
        host: what is known of the machine the result will run on, from `check_host`.
        engine: `"onednn"`, `"quantized"`, `"decomposed"` or `"reference"`. The last two have no kernels: operators are
            float between their conversions. Decomposed, these are torch's `quantized_decomposed` operators, around
            functions with dequantized weights, for `torch.export` and compilers: see `qfunc.engines.decomposed`.
            `"quantized"` takes the best of torch's own engines; `"quantized.x86"`, `"quantized.fbgemm"`,
            `"quantized.qnnpack"` and `"quantized.onednn"` choose one.
            `"auto"` is the first of `"onednn"`, `"quantized"` and `"reference"` of which the host's kernels for layers
            keep their contracts; a note of the certificate says which.
        kernels: rows to try before the engine's own; those of the user need a verdict in the report (`check_kernels`).
        strict: whether it is an error that an operator which was meant to run on integers stays float, or that a kernel
            it would have had fails its contract, even where another takes its place. A float island is no error: it
            takes and gives codes.

    Returns:
        The lowered graph, or `EngineMissing`, `UnknownName` for the engine, `NotLowered` for each node under `strict`,
        `UnsupportedDType` for what the decomposed operators cannot say, `UserFunctionFailed` for a constraint or a plan
        of a kernel of the user's, `WrongStage`.
    """
    if not isinstance(converted, Converted):
        return Failure(WrongStage(type(converted).__name__, "Converted"))
    problems = wrong_engine(engine, host) + wrong_arguments(kernels=kernels)
    if problems:
        return Failure(several(problems))
    engine, why = best_engine(host) if engine == AUTO else (engine, "")
    chosen = ENGINES[engine]
    problems = misplaced(kernels, chosen)
    if problems:
        return Failure(several(problems))
    moved, coded = moved_on_codes(converted.graph, chosen)
    chosen = replace(chosen, rows=(*guarded(kernels), *chosen.rows))
    lowering = _Lowering(replace(converted, graph=moved), host, chosen, coded)
    graph = lowering.run()
    if lowering.problems:
        return Failure(several(lowering.problems))
    graph = objects_of(graph, kernels)
    notes = (*converted.notes, *([Note("engine", why)] if why else []))
    entries = tuple(lowering.entries)
    conversions = sum(node.kind in _BORDERS for node in graph)
    graph, unwritable = chosen.write(graph)
    if unwritable:
        return Failure(several(unwritable))
    certificate = certified(entries, graph, engine=engine, host=host.title, conversions=conversions, notes=notes)
    if strict and certificate.refused:
        return Failure(several(NotLowered(converted.graph[e.node].place, e.reason) for e in certificate.refused))
    graph = recorded(converted.graph, graph, "lower", f"engine={engine}")
    codes = (converted.input_qparams, converted.output_qparams)
    return Success(Lowered(graph, certificate, engine, host, *codes, converted.original_weights))


def wrong_engine(engine: str, host: HostReport) -> list[Problem]:
    """What keeps an engine from running on a host: an unknown name, or kernels that its torch lacks."""
    problems = wrong_arguments(engine=engine, host=host)
    if problems:
        return problems
    if engine != AUTO and engine not in ENGINES:
        return [UnknownName(engine, "engine", (AUTO, *runnable(host)))]
    return [] if engine in (AUTO, *runnable(host)) else [EngineMissing(engine, runnable(host))]


class _Lowering:
    """One walk over a reference graph, in which what only moves elements computes on codes already."""

    def __init__(self, converted: Converted, host: HostReport, engine: Engine, coded: Mapping[str, Affine]) -> None:
        self.entries: list[Entry] = []
        self.problems: list[Problem] = []
        """What functions of the user's failed at."""
        self._graph = converted.graph
        self._intended = converted.intended
        self._floats = converted.floats
        self._host = Consulted.of(host)
        self._engine = engine.name
        self._conversions = dict(engine.conversions)
        self._moves = engine.moves
        self._why_none = engine.why_none
        self._coded = coded
        self._draft = Draft(self._graph)
        self._users = users(self._graph)
        self._rows: dict[str, list[KernelRow]] = {}
        for row in engine.rows:
            for kind in row.kinds:
                self._rows.setdefault(kind, []).append(row)

    def run(self) -> Graph:
        """The lowered graph."""
        numbers = non_tensors(self._graph)
        for node in self._graph:
            if node.kind in CONVERSIONS:
                # quantized tensors of activations are quint8; other codes stay plain, which no kernel of theirs takes
                affine = affine_of(node)
                if affine is not None and affine.dtype == "uint8" and node.kind in self._conversions:
                    self._draft.put(replace(node, kind=self._conversions[node.kind]))
            elif node.kind not in ("placeholder", "get_attr", "output", "requantize") and node.id not in numbers:
                self.entries.append(self._operator(node))
        return _without_dead(self._draft.commit())

    def _operator(self, node: Node) -> Entry:
        """Give a node its kernel, or the reason why it has none."""
        call = self._call(node)
        entry = self._entry(call)
        if node.id in self._coded:
            return replace(entry, form="moves", kernel="aten", output=self._coded[node.id].dtype)
        reasons = [self._floats[node.id]] if self._floats.get(node.id) else []
        told: list[str] = []
        verdicts: dict[str, Verdict] = {}
        meant = entry.intended and node.id not in self._floats
        for row in self._fitting(self._rows.get(node.kind, []), call):
            if not (meant or (row.name == ISLAND and self._borders_on_codes(call))):
                continue
            given = replace(call, output=None) if row.writes_floats else call
            planned, asked = self._planned(row, given)
            verdicts |= asked
            broken = [verdict for verdict in asked.values() if not verdict.ok]
            if isinstance(planned, Node):
                written = None if planned is node else given.output
                if planned is not node:
                    self._replace(node, planned, written)
                told += [f"{verdict.kernel}: fails its contract: {verdict.reason}" for verdict in broken]
                named = planned.kind in BY_NAME or row.name == ISLAND or is_own(planned)
                return replace(
                    entry,
                    form=_form(planned, row),
                    kernel=row.name if named else planned.kind,
                    output=written.dtype if written else "float32",
                    reason="; ".join(reasons if row.name == ISLAND else told),
                    engine=self._engine_of(planned, row),
                    weight=_weight(planned) or entry.weight,
                    contracts=tuple(verdicts.values()),
                )
            told += [planned] if broken or row.own is not None else []
            reasons += [planned] if planned not in reasons else []
        why = "; ".join(reasons) or (self._why_none(node) if meant else "")
        return replace(entry, reason=why, contracts=tuple(v for v in verdicts.values() if not v.ok))

    def _borders_on_codes(self, call: Call) -> bool:
        """Whether a float operator can do a conversion itself: of its result, or of an operand that it alone reads."""
        if call.output is not None:
            return True
        alone = (id for id in call.node.uses() if self._users[id] == (call.node.id,))
        return any(isinstance(self._operand(id).how, Affine) for id in alone)

    def _entry(self, call: Call) -> Entry:
        """What is known of an operator before it has a kernel."""
        node = call.node
        inputs = (self._dtype(operand) for operands in call.operands.values() for operand in operands)
        return Entry(
            node.id,
            node.origin.module,
            " + ".join((node.kind, *(post.kind for post in node.post))),
            "float",
            "",
            node.fact.dtype if isinstance(node.fact, TensorFact) else "float32",
            intended=node.id in self._intended,
            inputs=tuple(inputs),
            weight=_weight(node),
            multiply_adds=multiply_adds(node, self._graph),
        )

    def _dtype(self, operand: Operand) -> str:
        """The dtype in which an operand is computed with."""
        match operand.how:
            case Affine(dtype=dtype) | Cast(dtype=dtype):
                return dtype
            case Grid(spec=spec) | Dynamic(spec):
                return spec.dtype
            case None:
                fact = self._graph[operand.value].fact
                return fact.dtype if isinstance(fact, TensorFact) else "float32"

    def _engine_of(self, planned: Node, row: KernelRow) -> str:
        """Whose code runs a kernel."""
        if row.own is not None:
            return "own"
        if planned.has("engine"):
            return f"{self._engine}.{planned.get('engine')!s}"
        if row.name == ISLAND or planned.kind.startswith("codes.") or planned.kind in ATEN_KERNELS:
            return "aten"
        return (
            "onednn" if planned.kind in ("onednn.linear_float16", LINEAR_DYNAMIC, "recurrent_dynamic") else self._engine
        )

    def _fitting(self, rows: list[KernelRow], call: Call) -> list[KernelRow]:
        """The rows to try: where a kernel takes operands given as these are, no other need say that it does not."""
        fitting = [row for row in rows if row.accepts(call)]
        told = [row for row in rows if row in fitting or row.name == ISLAND or row.own is not None]
        return told if any(row.name != ISLAND for row in fitting) else rows

    def _planned(self, row: KernelRow, call: Call) -> tuple[Plan, dict[str, Verdict]]:
        """What a row makes of a call, a node or the reason why it makes none, and the verdicts that this depends on."""
        asked = self._host.asked
        asked.clear()
        if not row.accepts(call):
            return self._unfit(call, row), {}
        try:
            planned = row.plan(call)
        except OwnKernelError as error:
            self.problems.append(error.problem)
            return str(error.problem), {}
        if isinstance(planned, str) and all(verdict.ok for verdict in asked.values()):
            return f"{row.name}: {planned}", {}  # for another reason than a contract
        verdict = self._host.verdict(row.name) if row.checked else None
        if verdict is not None and not verdict.ok:
            planned = f"fails its contract: {verdict.reason}"
        if isinstance(planned, Node):
            return planned, dict(asked)
        return f"{row.name}: {planned}", {name: verdict for name, verdict in asked.items() if not verdict.ok}

    def _unfit(self, call: Call, row: KernelRow) -> str:
        """Why a row does not take the operands as they are given."""
        given = (refs_of for slot, refs_of in self._operand_refs(call.node))
        for id in (id for found in given for id in found):
            if not isinstance(self._operand(id).how, row.takes):
                return f"its operand {id!r} {_without_codes(self._graph[id])}"
        return "it has no quantized operand"

    def _operand_refs(self, node: Node) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The slots of activation operands, and the values in each."""
        named = BY_NAME[node.kind].tensors if node.kind in BY_NAME else tuple(name for name, _ in node.args)
        yield from ((slot, tuple(refs(node.get(slot)))) for slot in named)
        for index, post in enumerate(node.post):
            yield from ((f"post.{index}.{name}", tuple(refs(arg))) for name, arg in post.args)

    def _call(self, node: Node) -> Call:
        operands: dict[str, tuple[Operand, ...]] = {}
        dead: set[str] = set()
        for slot, ids in self._operand_refs(node):
            found = [self._operand(id) for id in ids]
            for id, operand in zip(ids, found, strict=True):
                is_dead = isinstance(operand.how, Affine) and self._read_once(node, id, operand.value)
                if is_dead and self._owns(operand.value):
                    dead.add(operand.value)
            if found:
                operands[slot] = tuple(found)
        return Call(node, operands, self._output(node), self._host, frozenset(dead))

    def _operand(self, id: str) -> Operand:
        """How the value of an operand is given."""
        source = self._graph[id]
        match source.kind:
            case "dequantize":
                given = source.get("input")
                how = given if isinstance(given, (Affine, Grid)) else None
                return Operand(id if how is None else next(source.uses()), how)
            case "quantize_dynamically":
                spec = source.get("spec")
                assert isinstance(spec, QuantSpec), source
                return Operand(next(source.uses()), Dynamic(spec))
            case "cast" if self._graph[next(source.uses())].kind == "cast":
                small = self._graph[next(source.uses())]
                dtype = small.get("dtype")
                assert isinstance(dtype, Name), small
                return Operand(next(small.uses()), Cast(dtype.name.removeprefix("torch.")))
            case _:
                return Operand(id, None)

    def _output(self, node: Node) -> Affine | None:
        """The qparams of the result where nothing but its quantization reads it."""
        readers = [self._graph[id] for id in self._users[node.id]]
        return affine_of(readers[0]) if [r.kind for r in readers] == ["quantize"] else None

    def _read_once(self, node: Node, floats: str, codes: str) -> bool:
        """Whether one operand of one node is all that reads these codes."""
        alone = self._users[floats] == (node.id,) and self._users[codes] == (floats,)
        return alone and sum(used == floats for used in node.uses()) == 1

    def _owns(self, codes: str) -> bool:
        """Whether codes have memory of their own.

        What moves elements may give a view, a kernel of the user's its very operand, and an input is the user's.
        """
        made = self._graph[codes]
        if made.kind == "placeholder" or made.kind in self._moves:
            return False
        source = self._draft[next(made.uses())]
        return source.kind not in self._moves and not is_own(source)

    def _replace(self, node: Node, kernel: Node, output: Affine | None) -> None:
        self._draft.put(kernel if output is None else replace(kernel, fact=fact_in(kernel.fact, output.dtype)))
        if output is not None:
            (codes,) = self._users[node.id]
            self._draft.redirect(codes, node.id)
            self._draft.erase([codes])


def _without_codes(source: Node) -> str:
    """Why a value has no codes that a kernel takes."""
    match source.kind:
        case "quantize_dynamically":
            return "is quantized when the model runs, and kernels take codes of known qparams"
        case "cast":
            return "is cast to a smaller float, and kernels take codes"
        case "dequantize":
            given = source.get("input")
            what = given if isinstance(given, Grid) else "codes whose qparams are known with the weights"
            return f"has codes that kernels do not take: {what}"
        case _:
            return "is float"


def _form(planned: Node, row: KernelRow) -> Form:
    """How a kernel computes."""
    if row.name == ISLAND:
        return "island"
    return "weights" if planned.kind in FLOAT_KERNELS else "integer"


def _weight(node: Node) -> str:
    """The dtype of an operator's weight; empty where it has none."""
    return dtype_of(node.get("weight")) if node.has("weight") else ""


_REMOVABLE = _ALL_CONVERSIONS | {"requantize", "get_attr"}


def _without_dead(graph: Graph) -> Graph:
    """The graph without conversions that nobody reads, and parameters that only stood for those of a layer."""
    live: set[str] = set()
    dead: list[str] = []
    for id in reversed(graph.order):
        node = graph[id]
        if node.kind in _REMOVABLE and id not in live:
            dead.append(id)
        else:
            live.update(node.uses())
    draft = Draft(graph)
    draft.erase(dead)
    return draft.commit()
