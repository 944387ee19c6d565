"""The stages that a graph passes through, as values. Each holds the graph it is about."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeGuard

from pyrsistent import PMap, pmap

from qfunc.config.annotation import Derived, ParameterSpec
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig, Swap
from qfunc.config.point import Edge
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import Problem
from qfunc.ir import Expression, Graph, Note, Opaque
from qfunc.numerics.grid import Grid
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.statistic import RangeState
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat
from qfunc.passes.statistics import Fold, Statistics, folds_of

Owner: TypeAlias = tuple[str, str]
"""What has qparams of its own: ("site", its name), or ("weight" or "bias", the id of the node)."""

Folding: TypeAlias = Literal["approximate", "exact"]
"""Whether the statistics of a batch are those of the rounded weight, or of the weight as it is, by a second pass."""

SiteObserver: TypeAlias = Observer[Any] | Derived | Dynamic | Cast
"""What says how a site is quantized: an observer, which measures, or what measures nothing."""


def measures(observer: SiteObserver | ParameterSpec | None) -> TypeGuard[Observer[Any]]:
    """Whether calibration is to show it data."""
    return not isinstance(observer, (Derived, Dynamic, Cast, KeepFloat, type(None)))


@dataclass(frozen=True, slots=True)
class Site:
    """A place of quantization: `observer` is for the values `taps`, in graph order; all that use it share qparams."""

    id: str
    observer: SiteObserver
    taps: tuple[str, ...]

    @property
    def folds(self) -> tuple[Fold, ...]:
        """What calibration is to measure for it: nothing, or one fold for all its values or for each."""
        return folds_of(self.taps, self.observer) if measures(self.observer) else ()


@dataclass(frozen=True, slots=True)
class Equalization:
    """A value that layers read scaled channel by channel: `site` measures it, `edges` are the uses that are scaled.

    `specs` are those that the scaled uses are quantized for, in the order of the edges.
    """

    site: Site
    edges: tuple[Edge, ...]
    specs: tuple[QuantSpec, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a stage was prepared from; `equalized` are the layers that were picked.

    It is pickled where it can be: a stage is no less itself without.
    """

    qconfig_mapping: QConfigMapping
    backend: BackendConfig
    custom: CustomConfig
    equalized: tuple[str, ...] = ()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., Configuration | None], tuple[bytes]]:
        parts = (self.qconfig_mapping, self.backend, self.custom, self.equalized)
        try:
            return _configured, (pickle.dumps(parts),)
        except Exception:  # noqa: BLE001 - what a user's selector or observer raises when it is pickled is the user's code
            return _configured, (b"",)


def _configured(parts: bytes) -> Configuration | None:
    return Configuration(*pickle.loads(parts)) if parts else None  # noqa: S301 - within what is being unpickled


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph and its observation sites, as data.

    `outputs` maps a value to the site it is quantized with for all its users; `inputs` maps single edges of values that
    are float otherwise; `weights` and `biases` map nodes to how these parameters of theirs are quantized; `floats` says
    of each node that stays float why; those of them in `refused` are layers that the configuration meant to quantize.
    `swapped` are the calls of custom modules, `unrounded` the uses that read a quantized value in float.
    `notes` tell of entries of the configuration that match nothing.
    `quantized_inputs` and `quantized_outputs` are the inputs and the positions of the output that the converted model
    takes and gives as codes. `equalizations` are by the ids of their sites.
    """

    graph: Graph
    sites: PMap[str, Site]
    outputs: PMap[str, str]
    inputs: PMap[Edge, str]
    weights: PMap[str, ParameterSpec]
    backend: str
    floats: PMap[str, str] = field(default=pmap(), compare=False)
    refused: frozenset[str] = field(default=frozenset(), compare=False)
    notes: tuple[Note, ...] = field(default=(), compare=False)
    biases: PMap[str, ParameterSpec] = pmap()
    quantized_inputs: frozenset[str] = frozenset()
    quantized_outputs: frozenset[int] = frozenset()
    equalizations: PMap[str, Equalization] = pmap()
    swapped: PMap[str, Swap] = pmap()
    unrounded: frozenset[Edge] = frozenset()
    configuration: Configuration | None = field(default=None, compare=False, repr=False)
    """What it was made of; None for annotations."""
    folding: Folding | None = None
    """How batch norms are folded into the weights that a model trains with; None for one that is not to be trained."""

    __hash__ = None  # type: ignore[assignment]

    @property
    def measured(self) -> tuple[Site, ...]:
        """The sites that calibration shows data, by name."""
        scaled = {id: equalization.site for id, equalization in self.equalizations.items()}
        return tuple(site for _, site in sorted({**self.sites, **scaled}.items()) if measures(site.observer))

    @property
    def folds(self) -> tuple[Fold, ...]:
        """What calibration measures, each key once."""
        return tuple({fold.key: fold for site in self.measured for fold in site.folds}.values())


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A prepared graph and the statistics of the data that was run through it."""

    prepared: Prepared
    statistics: Statistics
    modules: PMap[str, Opaque] = pmap()
    """The custom modules that were calibrated, by the paths of the modules they stand for."""
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    """What was wrong with the data and could be borne: batches left out, values clipped, values that never change."""
    columns: PMap[str, RangeState] = pmap()
    """The ranges of the weights of layers to be equalized, by input channel; the layers by the ids of their nodes."""
    qparams: PMap[Owner, Grid] = pmap()
    """The qparams that training has settled."""
    states: PMap[Owner, Any] = pmap()
    """What the observers of weights and biases have found in training, to go on from there."""

    __hash__ = None  # type: ignore[assignment]

    @property
    def graph(self) -> Graph:
        """The graph that was observed."""
        return self.prepared.graph


@dataclass(frozen=True, slots=True)
class Converted:
    """The reference form: a float graph with quantize and dequantize nodes and quantized weight expressions."""

    graph: Graph
    backend: str
    intended: PMap[str, str] = pmap()
    """The nodes that are meant to run on integers, and the path of the module each comes from."""
    floats: PMap[str, str] = field(default=pmap(), compare=False)
    """The nodes that are not, and why."""
    notes: tuple[Note, ...] = field(default=(), compare=False)
    input_qparams: PMap[str, Any] = pmap()
    """The qparams of the inputs that are codes, by the ids of their nodes."""
    output_qparams: PMap[int, Any] = pmap()
    """The qparams of the items of the output that are codes, by position."""
    original_weights: PMap[str, PMap[str, Expression]] | None = None
    """The float parameters of layers whose weights became integers, where they were asked for: see `convert`."""

    __hash__ = None  # type: ignore[assignment]
