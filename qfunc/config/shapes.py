"""How the values of a configuration look in a document, as data: what is written and what may be read.

A shape says of one value which JSON stands for it. `qfunc.config.writing` and `qfunc.config.reading` are the two ways
between them; nothing that a document names is imported or evaluated, only looked up in these tables.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, get_args

from torch import nn

from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.certificate import Certificate, Entry, Form
from qfunc.config.custom_fusion import CustomFusion
from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints
from qfunc.config.host_report import HostReport, Verdict
from qfunc.config.point import Edge
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.selectors import SELECTORS
from qfunc.ir import Note
from qfunc.match import Anything, Constant, MatchAllNode, Pattern, Step
from qfunc.numerics import observers
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.recording import Recording
from qfunc.numerics.saturation import PairLayout, PairLayouts
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.ops import FORMS, resolve


@dataclass(frozen=True, slots=True)
class Scalar:
    """A str, bool, int of at most 64 bits, or finite float."""

    type: type


@dataclass(frozen=True, slots=True)
class Plain:
    """What a field of the user's own observer may hold: scalars, `None`, tuples, specs and ways to quantize."""


@dataclass(frozen=True, slots=True)
class Choices:
    """A member of an enumeration, by its value."""

    members: type[Observation]


@dataclass(frozen=True, slots=True)
class Word:
    """A str of a few."""

    known: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value or `None`."""

    of: Shape


@dataclass(frozen=True, slots=True)
class Many:
    """A tuple, as an array."""

    of: Shape


@dataclass(frozen=True, slots=True)
class Names:
    """A frozenset of names, as a sorted array."""


@dataclass(frozen=True, slots=True)
class Table:
    """A map from names, or from functions by their names, as an object."""

    key: Scalar | Function
    of: Shape


@dataclass(frozen=True, slots=True)
class Record:
    """A frozen dataclass, as an object of its fields; those left out have their defaults."""

    type: type
    fields: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Row:
    """A tuple with a name for each item, as an object."""

    fields: Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Rows:
    """A map whose keys are tuples or records, as an array of objects: the parts of the key, then the value."""

    fields: Mapping[str, Shape]
    key: type = tuple


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of several types, as an object of one field, whose name says which."""

    cases: Mapping[str, tuple[type, Shape]]


@dataclass(frozen=True, slots=True)
class WithOrWithout:
    """One of two records, told apart by a field that only the first has."""

    field: str
    first: Record
    second: Record


@dataclass(frozen=True, slots=True)
class TextOr:
    """A str or a record."""

    of: Record


@dataclass(frozen=True, slots=True)
class Late:
    """A shape that holds itself."""

    shape: Callable[[], Shape]


@dataclass(frozen=True, slots=True)
class Function:
    """A function by its name: the user's by the registered one, those of `known` by their own; `what` is said of it."""

    what: str
    known: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator in a pattern of the user's, by its canonical or registered name; or a nested pattern, or a number."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """How something is quantized: an object of the fields of a class, and of its name.

    The name is called `observer` for what only observes, `quantization` for what is in `QUANTIZATIONS`.
    """


Shape: TypeAlias = (
    Scalar
    | Plain
    | Choices
    | Word
    | Maybe
    | Many
    | Names
    | Table
    | Record
    | Row
    | Rows
    | OneOf
    | WithOrWithout
    | TextOr
    | Late
    | Function
    | Operator
    | Quantized
)

TEXT, INT, FLOAT, FLAG = Scalar(str), Scalar(int), Scalar(float), Scalar(bool)
SCALARS: Mapping[Any, Scalar] = MappingProxyType({shape.type: shape for shape in (TEXT, INT, FLOAT, FLAG)})

SPEC = Record(
    QuantSpec,
    {"dtype": TEXT, "quant_min": INT, "quant_max": INT, "qscheme": TEXT, "ch_axis": Maybe(INT), "eps": FLOAT},
)

_SEARCHED = {"bins": INT, "stride": INT}

OBSERVERS: Mapping[str, Record] = MappingProxyType(
    {
        "Entropy": Record(Entropy, {"spec": SPEC, **_SEARCHED}),
        "FixedQParams": Record(observers.FixedQParams, {"spec": SPEC, "scale": FLOAT, "zero_point": INT}),
        "Histogram": Record(observers.Histogram, {"spec": SPEC, "bins": INT, "upsample_rate": INT}),
        "MeanSquaredError": Record(MeanSquaredError, {"spec": SPEC, **_SEARCHED}),
        "MinMax": Record(observers.MinMax, {"spec": SPEC}),
        "MovingAverageMinMax": Record(observers.MovingAverageMinMax, {"spec": SPEC, "averaging_constant": FLOAT}),
        "MovingAveragePerChannelMinMax": Record(
            observers.MovingAveragePerChannelMinMax, {"spec": SPEC, "averaging_constant": FLOAT}
        ),
        "PerChannelMinMax": Record(observers.PerChannelMinMax, {"spec": SPEC}),
        "Percentile": Record(Percentile, {"spec": SPEC, "percentile": FLOAT, **_SEARCHED}),
        "Recording": Record(Recording, {"spec": SPEC}),
    }
)
"""qfunc's observers by the names of their classes."""

TAGS = ("observer", "quantization")
"""The fields that hold the name of a class."""

QUANTIZATIONS: Mapping[str, Record] = MappingProxyType(
    {
        "Cast": Record(Cast, {"dtype": TEXT, "dynamic": FLAG}),
        "Dynamic": Record(Dynamic, {"spec": SPEC}),
        "FakeQuantize": Record(
            FakeQuantize, {"observer": Quantized(), "learned": FLAG, "scale_gradient": FLAG, "fused": FLAG}
        ),
        "KeepFloat": Record(KeepFloat, {}),
        "ReuseInput": Record(ReuseInput, {}),
    }
)
"""The other ways to quantize, by the names of their classes."""

QCONFIG = Record(QConfig, {"activation": Quantized(), "weight": Quantized(), "input_activation": Maybe(Quantized())})
_CHOICE = Maybe(QCONFIG)
_MAPPING = Record(
    QConfigMapping,
    {
        "global_qconfig": _CHOICE,
        "object_types": Table(TEXT, _CHOICE),
        "selections": Table(Function("selector", SELECTORS), _CHOICE),
        "module_name_regexes": Many(Row({"regex": TEXT, "qconfig": _CHOICE})),
        "module_names": Table(TEXT, _CHOICE),
        "module_name_object_type_orders": Rows(
            {"module_name": TEXT, "object_type": TEXT, "index": INT, "qconfig": _CHOICE}
        ),
        "nodes": Table(TEXT, _CHOICE),
        "outputs": Table(TEXT, Quantized()),
        "edges": Rows({"user": TEXT, "slot": TEXT, "index": INT, "quantization": Quantized()}, Edge),
    },
)

_SIDE = OneOf(
    {
        "anything": (Anything, Record(Anything, {})),
        "constant": (Constant, Record(Constant, {"value": Plain()})),
        "steps": (tuple, Many(Late(lambda: _STEP))),
    }
)
_STEP: Record = Record(
    Step,
    {
        "kinds": Many(TEXT),
        "forms": Names(),
        "takes": Many(TEXT),
        "sides": Many(Row({"position": INT, "side": _SIDE})),
        "arity": Maybe(INT),
        "repeats": FLAG,
    },
)
_FUNCTION = Function("function", MappingProxyType({}))
_FUSION = WithOrWithout(
    "fuser",
    Record(
        CustomFusion,
        {
            "fuser": _FUNCTION,
            "pattern": Many(Operator()),
            "complex_pattern": Many(Operator()),
            "root_node_getter": Maybe(_FUNCTION),
            "extra_inputs_getter": Maybe(_FUNCTION),
        },
    ),
    Record(Pattern, {"name": TEXT, "steps": Many(_STEP), "trains": FLAG, "unless": Many(_STEP)}),
)
_DTYPE = Maybe(
    TextOr(
        Record(
            DTypeWithConstraints,
            {
                "dtype": TEXT,
                "quant_min_lower_bound": Maybe(INT),
                "quant_max_upper_bound": Maybe(INT),
                "scale_min_lower_bound": Maybe(FLOAT),
                "scale_max_upper_bound": Maybe(FLOAT),
                "scale_exact_match": Maybe(FLOAT),
                "zero_point_exact_match": Maybe(INT),
            },
        )
    )
)
_DTYPES = ("input_dtype", "output_dtype", "weight_dtype", "bias_dtype")
_OPERATOR = Record(
    OperatorConfig,
    {
        "kinds": Many(TEXT),
        "observation": Choices(Observation),
        "dtypes": Many(Record(DTypeConfig, {**dict.fromkeys(_DTYPES, _DTYPE), "is_dynamic": FLAG})),
        "forms": Names(),
        "by_tensor_count": Many(Row({"count": INT, "observation": Choices(Observation)})),
        "fixed": Maybe(Quantized()),
        "float_output": FLAG,
        "narrows": FLAG,
        "inputs": Maybe(Many(TEXT)),
        "weight": Maybe(TEXT),
        "bias": Maybe(TEXT),
    },
)
_BACKEND = Record(
    BackendConfig,
    {
        "name": TEXT,
        "fusions": Many(_FUSION),
        "operators": Many(_OPERATOR),
        "qconfig_mapping": _MAPPING,
        "lazy": FLAG,
        "observe_shared_outputs": FLAG,
        "drop_identities": FLAG,
        "move_norms": FLAG,
    },
)

_VERDICTS = Many(Record(Verdict, {"kernel": TEXT, "ok": FLAG, "reason": TEXT}))
_LAYOUT = Word(get_args(PairLayout))
_LAYOUTS = Record(PairLayouts, {"dense": _LAYOUT, "depthwise": _LAYOUT})
_HOST = Record(
    HostReport,
    {
        **dict.fromkeys(("torch_version", "cpu_capability"), TEXT),
        **{name: Many(TEXT) for name in ("isa", "engines", "quantized_engines")},
        "onednn_layouts": _LAYOUTS,
        "quantized_layouts": Many(Row({"engine": TEXT, "layouts": _LAYOUTS})),
        "verdicts": _VERDICTS,
    },
)
_ENTRY = Record(
    Entry,
    {
        **dict.fromkeys(("node", "module", "operator", "kernel", "output", "reason", "weight", "engine"), TEXT),
        "form": Word(get_args(Form)),
        "intended": FLAG,
        "inputs": Many(TEXT),
        "contracts": _VERDICTS,
        "multiply_adds": Maybe(INT),
    },
)
_CERTIFICATE = Record(
    Certificate,
    {
        **dict.fromkeys(("engine", "host"), TEXT),
        "entries": Many(_ENTRY),
        **dict.fromkeys(("conversions", "requantizations", "weight_bytes", "float_weight_bytes"), INT),
        "limited": FLAG,
        "notes": Many(Record(Note, {"node": TEXT, "text": TEXT})),
    },
)

DOCUMENTS: Mapping[str, Record] = MappingProxyType(
    {
        "QConfig": QCONFIG,
        "QConfigMapping": _MAPPING,
        "BackendConfig": _BACKEND,
        "HostReport": _HOST,
        "Certificate": _CERTIFICATE,
    }
)
"""What a document can hold."""

OPERATORS: Mapping[str, Any] = MappingProxyType(
    {
        **{form.target: resolve(form.target) for (op, _), (_, form) in FORMS.items() if op != "call_method"},
        **{f"torch.nn.{name}": item for name, item in vars(nn).items() if isinstance(item, type)},
        **{f"operator.{name}": getattr(operator, name) for name in operator.__all__},
        "builtins.getattr": getattr,
        "MatchAllNode": MatchAllNode,
    }
)
"""The operators that a user's pattern can name without registering them; a method is a name behind a dot."""
