"""`annotate`: what a configuration and a backend quantize in a graph, use by use and value by value."""

from __future__ import annotations

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.annotation import Annotations
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import places_of, problems_of
from qfunc.errors import WrongStage, several
from qfunc.ir import Graph
from qfunc.passes.borders import quantized_outputs, with_borders
from qfunc.passes.rules import Rules
from qfunc.passes.unmatched import unmatched, without_effect
from qfunc.result import R

NOTHING = CustomConfig()


def annotate(
    graph: Graph,
    qconfig_mapping: QConfigMapping | None = None,
    *,
    backend: BackendConfig = CPU,
    custom: CustomConfig = NOTHING,
) -> R[Annotations]:
    """What is quantized in a graph by the rules of `backend` and the configuration.

    The operands of a quantized operator are, and its result, unless it shares its input's qparams. A value whose memory
    is changed in place, or that is not floating point, never is. Where the dtypes of a configuration do not suit an
    operator, that stays float.

    Args:
        graph: a traced, usually fused graph.
        qconfig_mapping: what to quantize, and how; by default the backend's own.
        backend: what can be quantized.
        custom: exceptions for the model; of them, the inputs and outputs that are to be codes.

    Returns:
        The annotations, with a note for each entry of the configuration that matches or changes nothing; or all of:
        `UnknownName` for a module or node that does not exist or an unknown dtype, `BadConfig` for impossible
        observers, for fused operators with different configurations and for outputs that cannot be codes,
        `UnsupportedDType` for an entry whose dtypes suit no operator that it names, `UserFunctionFailed` for a selector
        that raises.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems = wrong_arguments(
        backend=backend,
        qconfig_mapping=QConfigMapping() if qconfig_mapping is None else qconfig_mapping,
        custom=custom,
    )
    if problems:
        return Failure(several(problems))
    mapping = backend.qconfig_mapping if qconfig_mapping is None else qconfig_mapping
    problems = [*problems_of(mapping, graph.modules), *places_of(mapping, graph)]
    if problems:
        return Failure(several(problems))
    rules = Rules(graph, mapping, backend, demanded=frozenset(quantized_outputs(graph, custom).values()))
    asked = QConfigMapping() if qconfig_mapping is None else qconfig_mapping
    notes = (*unmatched(asked, graph, backend.qconfig_mapping, rules.unused), *without_effect(asked, rules))
    annotations, problems = with_borders(graph, rules.annotations(notes), mapping, custom)
    found = [*rules.problems, *problems]
    return Failure(several(found)) if found else Success(annotations)
