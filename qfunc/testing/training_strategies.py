"""Hypothesis strategies for models to be trained, and configurations that round while they train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from qfunc.backends import CPU, X86
from qfunc.config.backend_config import BackendConfig
from qfunc.config.qconfig import Choice, QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.training import for_training, with_each
from qfunc.edge.trace import trace
from qfunc.numerics import qparams as q
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.qparams import FLOAT_QPARAMS
from qfunc.numerics.unmeasured import UNMEASURED
from qfunc.quantize import fuse
from qfunc.testing.operations import FAMILIES
from qfunc.testing.quantizations import activation_observers, weight_observers
from qfunc.testing.strategies import configurations, models
from qfunc.testing.training_walk import TrainingCase
from qfunc.testing.walk import Case


def rounded(mapping: QConfigMapping, *, learned: bool = False) -> QConfigMapping:
    """The mapping whose observers, whatever they are, are in `FakeQuantize`."""

    def of(given: Any) -> Any:
        if given is None or isinstance(given, UNMEASURED):
            return given
        observer = given.observer if isinstance(given, FakeQuantize) else given
        learns = learned and not is_fixed(observer) and observer.spec.qscheme != FLOAT_QPARAMS
        return FakeQuantize(observer, learned=learns)

    def of_operator(choice: Choice) -> Choice:
        return (
            None if choice is None else QConfig(of(choice.activation), of(choice.weight), of(choice.input_activation))
        )

    return with_each(mapping, of_operator, of)


LAYERED = (
    "conv",
    "conv_transpose",
    "linear",
    "norm",
    "block",
    "activation",
    "pool",
    "arithmetic",
    "sharing",
    "embedding",
)
"""The families of operators that have weights, and of what stands between them."""

_WAYS: tuple[Callable[[QConfigMapping], QConfigMapping], ...] = (
    for_training,
    lambda mapping: for_training(mapping, learned=True),
    rounded,
    lambda mapping: rounded(mapping, learned=True),
    lambda mapping: mapping,
)
"""What becomes of a configuration for quantization after training; as it is, little of it is rounded in training."""


_SPECS = (q.UINT8, q.UINT8_REDUCED, q.QuantSpec(quant_max=15))
_WEIGHT_SPECS = (q.INT8_NARROW_PER_CHANNEL, q.INT8_SYMMETRIC, q.QuantSpec("int8", -8, 7, "per_channel_symmetric", 0))
_STATIC = st.builds(
    QConfig,
    st.sampled_from([each for spec in _SPECS for each in activation_observers(spec)]),
    st.sampled_from([each for spec in _WEIGHT_SPECS for each in weight_observers(spec)]),
)
"""Ways that the backends can run."""


@st.composite
def training_cases(
    draw: st.DrawFn,
    *,
    max_nodes: int = 6,
    families: Sequence[str] | None = None,
    aliasing: bool = False,
    configured: bool = False,
    invalid: bool = False,
    backends: Sequence[BackendConfig] = (CPU, X86),
    engine: str = "reference",
) -> TrainingCase:
    """Models with data to train on, for `qfunc.testing.check_training_laws`.

    With `configured` the configuration is random instead of the backend's own, `for_training`; with `invalid` it is
    sometimes impossible. Foldings and backends are drawn, and whether the model is traced in evaluation mode. By
    default every other model is made of layers for the most part.
    """
    drawn_from = families or draw(st.sampled_from((LAYERED, FAMILIES)))
    model = draw(models(max_nodes=max_nodes, families=drawn_from, aliasing=aliasing))
    batches = model.batches(1, draw(st.sampled_from([None, 3])))
    backend = draw(st.sampled_from(list(backends)))
    mapping = None
    if configured or invalid:
        graph = trace(model.module, model.example_inputs).bind(lambda traced: fuse(traced, backend=backend, qat=True))
        drawn = draw(configurations(graph.value_or(model.module), invalid=invalid))
        drawn = draw(st.sampled_from((drawn, drawn.set_global(draw(_STATIC)))))
        mapping = drawn if invalid and draw(st.booleans()) else draw(st.sampled_from(_WAYS))(drawn)
    case = Case(model.module, model.example_inputs, batches, backend, engine, mapping)
    return TrainingCase(case, draw(st.sampled_from(("approximate", "exact"))), draw(st.booleans()))
