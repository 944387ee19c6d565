"""Every written form of every kind: it normalizes to the same arguments and computes the same values."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc.edge.materialize import materialize
from qfunc.edge.schema import VIEWS
from qfunc.edge.trace import trace
from qfunc.ir import Graph, Node, Origin, Ref, SliceArg
from qfunc.ops import BY_NAME, FORMS, KINDS, Form, Kind, Param, name_of, resolve
from qfunc.ops.kind import REQUIRED
from qfunc.params import Load
from qfunc.passes.numbers import non_tensors
from qfunc.result import unwrap
from qfunc.testing import same_bits

Sample = dict[str, Any]


def t(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _conv(rank: int) -> list[Sample]:
    base = {"input": t(2, 4, *(7,) * rank), "weight": t(6, 4, *(3,) * rank)}
    grouped = {**base, "weight": t(6, 2, *(3,) * rank), "bias": t(6), "groups": 2}
    full = {**grouped, "stride": 2, "padding": (1,) * rank, "dilation": [2] * rank}
    return [base, full, {**grouped, "padding": "same", "dilation": 2}, {**full, "dilation": 1}]


def _padded(rank: int) -> list[Sample]:
    modes = ("reflect", "replicate", "circular")
    return [{**s, "padding_mode": mode} for mode in modes for s in _conv(rank)[1:3]]


def _conv_transpose(rank: int) -> list[Sample]:
    base = {"input": t(2, 4, *(5,) * rank), "weight": t(4, 6, *(3,) * rank)}
    grouped = {**base, "weight": t(4, 3, *(3,) * rank), "bias": t(6), "groups": 2}
    full = {**grouped, "stride": 2, "padding": (1,) * rank, "output_padding": 1, "dilation": [2] * rank}
    uneven = {**base, "stride": 3, "output_padding": (*(1,) * (rank - 1), 2)}
    return [base, grouped, full, uneven]


def _norm(rank: int) -> list[Sample]:
    sides = {1: (), 2: (4, 4), 3: (2, 2, 2)}[rank]
    stats = {"input": t(5, 3, *sides), "running_mean": t(3), "running_var": t(3).abs() + 0.5}
    full = {**stats, "weight": t(3), "bias": t(3), "momentum": 0.2, "eps": 0.01}
    return [{**full, "training": False}, {**full, "training": True}, {**stats, "training": False}]


def _pool(rank: int, **more: Any) -> list[Sample]:
    x = {"input": t(2, 3, *(7,) * rank)}
    return [
        {**x, "kernel_size": 2},
        {**x, "kernel_size": (3,) * rank, "stride": 2, "padding": 1, "ceil_mode": True, **more},
    ]


def _layer_norm() -> list[Sample]:
    x = {"input": t(2, 3, 4, 5)}
    full = {**x, "normalized_shape": (4, 5), "weight": t(4, 5), "bias": t(4, 5), "eps": 0.01}
    return [{**x, "normalized_shape": [5]}, full, {**x, "normalized_shape": (5,), "weight": t(5)}]


def _instance_norm(rank: int) -> list[Sample]:
    x = {"input": t(2, 3, *(4,) * rank)}
    affine = {**x, "weight": t(3), "bias": t(3), "eps": 0.01}
    stats = {"running_mean": t(3), "running_var": t(3).abs() + 0.5, "momentum": 0.2}
    return [x, affine, {**affine, **stats, "use_input_stats": False}, {**x, **stats, "use_input_stats": True}]


def _pad(rank: int) -> list[Sample]:
    x = {"input": t(2, 3, *(4,) * rank), "pad": tuple(range(2 * rank)) if rank == 1 else (1, 2, 0, 1, 2, 1)[: 2 * rank]}
    modes = [{**x, "mode": mode} for mode in ("reflect", "replicate", "circular")]
    listed = {**x, "pad": [*x["pad"]], "mode": "constant", "value": 1.5}
    return [x, {**x, "mode": "constant", "value": None}, listed, *modes]


INDICES = torch.tensor([[0, 2, 1], [3, 3, 0]])
X = {"input": t(2, 3, 4, 5)}
SAMPLES: dict[str, list[Sample]] = {
    **{f"conv{rank}d": _conv(rank) + _padded(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _conv_transpose(rank) for rank in (1, 2, 3)},
    "leaky_relu": [X, {**X, "negative_slope": 0.2}],
    "elu": [X, {**X, "alpha": 0.5}],
    "gelu": [X, {**X, "approximate": "tanh"}],
    "celu": [X, {**X, "alpha": 0.5}],
    "softplus": [X, {**X, "beta": 2.0, "threshold": 1.5}],
    "hardshrink": [X, {**X, "lambd": 0.25}],
    "softshrink": [X, {**X, "lambd": 0.25}],
    "threshold": [{**X, "threshold": 0.25, "value": -1.0}],
    "pow": [{**X, "other": 2}, {**X, "other": 3.0}, {"input": t(2, 3).abs(), "other": t(2, 3)}],
    **{name: [{"input": t(2, 3, 4, 5).abs() + 0.1}] for name in ("log", "sqrt", "rsqrt")},
    "prelu": [{**X, "weight": t(3)}, {**X, "weight": t(1)}],
    "linear": [{"input": t(2, 4), "weight": t(3, 4)}, {"input": t(2, 5, 4), "weight": t(3, 4), "bias": t(3)}],
    "batch_norm": [sample for rank in (1, 2, 3) for sample in _norm(rank)],
    "clamp": [
        {**X, "min": 0.0, "max": 6.0},
        {**X, "min": -0.5, "max": 0.5},
        {**X, "min": -1.0, "max": 1.0},
        {**X, "min": 0.25},
        {**X, "max": 0.25},
    ],
    "add": [
        {**X, "other": t(2, 3, 4, 5)},
        {**X, "other": t(3, 1, 1)},
        {**X, "other": 2.5},
        {**X, "other": t(2, 3, 4, 5), "alpha": 2},
    ],
    "sub": [
        {**X, "other": t(2, 3, 4, 5)},
        {**X, "other": 2.5},
        {**X, "other": t(3, 1, 1), "alpha": 2},
    ],
    "div": [
        {**X, "other": t(2, 3, 4, 5)},
        {**X, "other": 2},
        {**X, "other": t(3, 1, 1), "rounding_mode": "floor"},
        {**X, "other": 0.5, "rounding_mode": "trunc"},
    ],
    "floor_divide": [{**X, "other": t(2, 3, 4, 5)}, {**X, "other": 0.5}],
    "matmul": [{**X, "other": t(5, 2)}, {**X, "other": t(2, 1, 5, 3)}, {"input": t(4), "other": t(4)}],
    "attention": [
        {"input": t(2, 3, 4), "key": t(2, 5, 4), "value": t(2, 5, 6)},
        {"input": t(2, 3, 4), "key": t(2, 3, 4), "value": t(2, 3, 4), "is_causal": True, "scale": 0.3},
        {"input": t(2, 3, 4), "key": t(2, 5, 4), "value": t(2, 5, 4), "attn_mask": t(3, 5)},
    ],
    "bmm": [{"input": t(2, 3, 4), "other": t(2, 4, 2)}],
    "addmm": [
        {"bias": t(5), "input": t(3, 4), "weight": t(4, 5)},
        {"bias": t(3, 5), "input": t(3, 4), "weight": t(4, 5), "beta": 2, "alpha": 0.5},
    ],
    "layer_norm": _layer_norm(),
    "group_norm": [
        {"input": t(2, 6, 4), "num_groups": 3},
        {"input": t(2, 6, 4, 4), "num_groups": 2, "weight": t(6), "bias": t(6), "eps": 0.01},
    ],
    "instance_norm": [sample for rank in (1, 2, 3) for sample in _instance_norm(rank)],
    "embedding": [
        {"input": INDICES, "weight": t(4, 5)},
        {"input": INDICES, "weight": t(4, 5), "padding_idx": 3, "scale_grad_by_freq": True, "sparse": True},
    ],
    "embedding_bag": [
        {"input": INDICES, "weight": t(4, 5), "mode": "sum"},
        {"input": INDICES, "weight": t(4, 5), "mode": "max", "padding_idx": 3},
        {"input": INDICES[0], "weight": t(4, 5), "offsets": torch.tensor([0, 2]), "sparse": True},
        {"input": INDICES, "weight": t(4, 5), "mode": "sum", "per_sample_weights": t(2, 3)},
        {
            "input": INDICES[0],
            "weight": t(4, 5),
            "offsets": torch.tensor([0, 2, 3]),
            "scale_grad_by_freq": True,
            "include_last_offset": True,
        },
    ],
    "softmax": [X, {**X, "dim": 1}, {**X, "dim": -3}, {**X, "dim": -1, "dtype": torch.float64}],
    "log_softmax": [X, {**X, "dim": 1}, {**X, "dim": -1, "dtype": torch.float64}],
    "masked_fill": [{**X, "mask": t(2, 3, 4, 5) > 0, "value": -1.0}, {**X, "mask": t(4, 1) > 0, "value": 0}],
    **{
        f"adaptive_max_pool{rank}d": [
            {"input": t(2, 3, *(7,) * rank), "output_size": size} for size in (1, (2,) * rank, [3] * rank)
        ]
        for rank in (1, 2, 3)
    },
    "interpolate": [
        {**X, "scale_factor": 2},
        {**X, "scale_factor": (2.0, 1.5), "recompute_scale_factor": True},
        {**X, "size": (7, 6)},
        {**X, "scale_factor": 2.0, "mode": "bilinear", "align_corners": True},
        {**X, "size": 6, "mode": "bicubic", "align_corners": False, "antialias": True},
    ],
    "pad": [sample for rank in (1, 2, 3) for sample in _pad(rank)],
    "pixel_shuffle": [{"input": t(2, 8, 3, 3), "upscale_factor": 2}],
    "pixel_unshuffle": [{"input": t(2, 2, 4, 6), "downscale_factor": 2}],
    "channel_shuffle": [{"input": t(2, 6, 3, 3), "groups": 3}],
    "mul": [{**X, "other": t(2, 3, 4, 5)}, {**X, "other": t(3, 1, 1)}, {**X, "other": 2}],
    "stack": [{"tensors": (t(2, 3), t(2, 3) + 1), "dim": 1}, {"tensors": [t(2, 3), t(2, 3) + 1]}],
    "cat": [{"tensors": (t(2, 3), t(2, 4)), "dim": 1}, {"tensors": [t(2, 3), t(3, 3)]}],
    **{f"max_pool{rank}d": _pool(rank, dilation=1) for rank in (1, 2, 3)},
    "avg_pool1d": _pool(1, count_include_pad=False),
    **{f"avg_pool{rank}d": _pool(rank, count_include_pad=False, divisor_override=5) for rank in (2, 3)},
    **{
        f"adaptive_avg_pool{rank}d": [
            {"input": t(2, 3, *(7,) * rank), "output_size": size}
            for size in (1, 3, (2,) * rank, (*(None,) * (rank - 1), 2))
        ]
        for rank in (1, 2, 3)
    },
    **{
        name: [X, {**X, "dim": 1}, {**X, "dim": (2, 3), "keepdim": True}, {**X, "dim": [-1], "dtype": torch.float64}]
        for name in ("mean", "sum")
    },
    "flatten": [X, {**X, "start_dim": 1}, {**X, "start_dim": 1, "end_dim": 2}],
    "reshape": [{**X, "shape": (2, -1)}, {**X, "shape": [-1]}, {**X, "shape": (4, 3, 10)}],
    "permute": [{**X, "dims": (0, 2, 3, 1)}, {**X, "dims": [3, 2, 1, 0]}],
    "transpose": [{**X, "dim0": 1, "dim1": -1}],
    "squeeze": [{"input": t(2, 1, 3, 1)}, {"input": t(2, 1, 3, 1), "dim": 1}, {"input": t(2, 1, 3, 1), "dim": (1, 3)}],
    "unsqueeze": [{**X, "dim": 1}, {**X, "dim": -1}],
    "unflatten": [{"input": t(2, 6, 4), "dim": 1, "sizes": (2, 3)}, {"input": t(2, 6), "dim": -1, "sizes": [3, -1]}],
    "narrow": [{**X, "dim": 1, "start": 1, "length": 2}, {**X, "dim": -1, "start": -2, "length": 1}],
    "getitem": [
        {**X, "index": index}
        for index in (0, slice(1, None), (slice(None), 1), (..., slice(None, None, 2)), (None, -1), INDICES[0, :2] // 2)
    ],
    "chunk": [{**X, "chunks": 2}, {**X, "chunks": 3, "dim": -1}],
    "split": [{**X, "split_size": 1}, {**X, "split_size": [1, 2], "dim": 1}, {**X, "split_size": 2, "dim": -1}],
    "unbind": [X, {**X, "dim": 1}],
    "flip": [{**X, "dims": [0]}, {**X, "dims": [0, -1]}],
    "roll": [{**X, "shifts": 1}, {**X, "shifts": [1, 2], "dims": [0, 1]}, {**X, "shifts": -1, "dims": 1}],
    "movedim": [{**X, "source": 0, "destination": 1}],
    "select": [{**X, "dim": 1, "index": -1}],
    "index_select": [{**X, "dim": 1, "index": torch.tensor([1, 0, 1])}],
    "expand": [{"input": t(3, 1), "size": (2, 3, 4)}, {"input": t(3, 1), "size": [-1, 4]}],
    "repeat": [{**X, "repeats": (1, 2, 1, 3)}, {"input": t(3), "repeats": (2, 2)}, {"input": t(3), "repeats": [4]}],
    "repeat_interleave": [
        {**X, "repeats": 2},
        {**X, "repeats": 3, "dim": 1},
        {**X, "repeats": torch.tensor([2, 0, 1]), "dim": 1, "output_size": 3},
    ],
    "dropout": [
        {"input": t(*size), "p": 0.3, "training": False} for size in ((2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 2))
    ],
    "identity": [X],
}  # fmt: skip
for _row in KINDS:
    SAMPLES.setdefault(_row.name, [X])


def constructed(row: Kind, form: Form, sample: Sample) -> nn.Module | None:
    """The module of a form with the sample's options and tensors; `None` where it cannot have them."""
    cls = resolve(form.target)
    known = inspect.signature(cls).parameters
    tensors = {k: v for k, v in sample.items() if isinstance(v, Tensor) and k != "input"}
    names = {param.name: param.keyword for text in form.attributes for param in _params(text)}
    options = {names.get(k, k): v for k, v in sample.items() if k not in tensors and k != "input"}
    training = options.pop("training", None)
    for key, value in form.fixed:
        if options.pop(key, value) != value or key not in sample:
            return None
    if "Norm" in form.target:
        sizes = _norm_sizes(form.target, sample)
        if sizes is None:
            return None
        options |= sizes
    elif "weight" in tensors:
        options |= _sizes(form.target, tensors, options)
    if not options.keys() <= known.keys() or _defaults_differ(row, names, options, known):
        return None
    if any(
        k not in options and p.default is p.empty and p.kind is not p.VAR_KEYWORD and k not in ("args", "kwargs")
        for k, p in known.items()
    ):
        return None
    made = cls(**options)
    made.train(bool(training))
    if any(not hasattr(made, name) for name in tensors):
        return None
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(made, name).copy_(tensor)
    return made


def _norm_sizes(target: str, sample: Sample) -> Sample | None:
    """What else the constructor of a norm wants; `None` where the sample is of another rank."""
    channels, affine = sample["input"].shape[1], "weight" in sample
    if "Layer" in target:
        return {"elementwise_affine": affine, "bias": "bias" in sample}
    if "Group" in target:
        return {"num_channels": channels, "affine": affine}
    rank = int(target[-2])
    if sample["input"].dim() not in ((2, 3) if "Batch" in target and rank == 1 else (rank + 2,)):
        return None
    tracked = {"track_running_stats": "running_mean" in sample} if "Instance" in target else {}
    return {"num_features": channels, "affine": affine, **tracked}


def _sizes(target: str, tensors: dict[str, Tensor], options: Sample) -> Sample:
    """The sizes that the constructor of a layer wants, of its weight's."""
    outs, *rest = tensors["weight"].shape
    if "Embedding" in target:
        return {"num_embeddings": outs, "embedding_dim": rest[0]}
    if "PReLU" in target:
        return {"num_parameters": outs}
    if "Linear" in target:
        return {"in_features": rest[0], "out_features": outs, "bias": "bias" in tensors}
    ins = rest[0] * options.get("groups", 1)
    if "Transpose" in target:
        ins, outs = outs, ins
    dilation = options.get("dilation", 1)
    return {
        "in_channels": ins,
        "out_channels": outs,
        "kernel_size": tuple(rest[1:]),
        "bias": "bias" in tensors,
        "dilation": tuple(dilation) if isinstance(dilation, list) else dilation,
    }


def _defaults_differ(row: Kind, names: dict[str, str], options: Sample, known: Any) -> bool:
    own = {k: known[k].default for n, k in names.items() if k in known and k not in options and n not in row.weights}
    return any(
        own.get(names.get(p.name, ""), p.default) not in (p.default, inspect.Parameter.empty) for p in row.params
    )


def _params(text: str) -> tuple[Param, ...]:
    from qfunc.ops.kind import signature

    return signature(text)


class Call(nn.Module):
    """A call of a form's function or method with some arguments by position and others by keyword."""

    def __init__(
        self,
        form: Form,
        sample: Sample,
        positional: list[Param],
        keywords: dict[str, str],
        weights: tuple[str, ...],
        spread: bool,
    ) -> None:
        super().__init__()
        self.form, self.positional, self.keywords, self.spread = form, positional, keywords, spread
        self.values = dict(sample)
        for name in weights:
            if isinstance(sample.get(name), Tensor):
                self.register_buffer(f"w_{name}", sample[name].clone())
        self.weights = weights

    def call(self, a: Tensor, b: Any) -> Tensor:
        given = {**self.values, **{n: getattr(self, f"w_{n}") for n in self.weights if hasattr(self, f"w_{n}")}}
        if "tensors" in given:
            given["tensors"] = type(given["tensors"])((a, b))
        else:
            given["input"] = a.clone() if self.form.inplace else a
            if isinstance(given.get("other"), Tensor):
                given["other"] = b
        args: list[Any] = []
        for param in self.positional:
            value = given[param.name]
            args.extend(value if param.how == "spread" and self.spread else (value,))
        kwargs = {keyword: given[name] for keyword, name in self.keywords.items()}
        if self.form.op == "call_method":
            return getattr(args[0], self.form.target)(*args[1:], **kwargs)
        return resolve(self.form.target)(*args, **kwargs)


class One(Call):
    def forward(self, a: Tensor) -> Tensor:
        return self.call(a, None)


class Two(Call):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.call(a, b)


def operands(sample: Sample) -> tuple[Tensor, ...]:
    if "tensors" in sample:
        return tuple(sample["tensors"])
    return tuple(sample[k] for k in ("input", "other") if isinstance(sample.get(k), Tensor))


def spellings(row: Kind, form: Form, sample: Sample) -> Iterator[nn.Module]:
    """The calls of a form that say what the sample says: by position, by keyword, spread and in a tuple."""
    if form.op == "call_module":
        made = constructed(row, form, sample)
        if made is not None:
            yield made
        return
    fixed = dict(form.fixed)
    params = [p for p in form.params if p.how in ("plain", "spread")]
    names = {p.name for p in params}
    tensors = {name for name, value in sample.items() if isinstance(value, Tensor)}
    if any(name in tensors or name not in sample or sample[name] != value for name, value in fixed.items()):
        return
    if not sample.keys() <= names | fixed.keys():
        return
    values = {p.name: sample.get(p.name, p.default) for p in params}
    if REQUIRED in values.values():
        return
    if any(p.name not in sample and row_default(row, p.name) != p.default for p in params):
        return
    full = {**values, **sample}
    module = Two if len(operands(sample)) == 2 else One
    leading = [p for p in form.params if p.how in ("plain", "spread")]
    cut = next((i for i, p in enumerate(form.params) if p.how in ("only_default", "inplace")), len(form.params))
    leading = [p for p in leading if form.params.index(p) < cut]
    used = max((i for i, p in enumerate(leading) if p.name in sample), default=-1) + 1
    rest = {p.keyword: p.name for p in params if p not in leading[:used] and p.name in sample}
    for spread in (False, True):
        yield module(form, full, leading[:used], rest, row.weights, spread)
    first = 1 if form.op == "call_method" else 0
    if not form.target.startswith("operator."):
        by_keyword = {p.keyword: p.name for p in params[first:] if p.name in sample}
        yield module(form, full, params[:first], by_keyword, row.weights, False)
    if "dim" in by_keyword_names(params) and "dim" in sample and form.target not in ("squeeze", "torch.squeeze"):
        numpy = {
            {"dim": "axis", "keepdim": "keepdims"}.get(k, k): n
            for k, n in ((p.keyword, p.name) for p in params[1:])
            if n in sample
        }
        yield module(form, full, params[:1], numpy, row.weights, False)


def by_keyword_names(params: list[Param]) -> set[str]:
    return {p.keyword for p in params}


def row_default(row: Kind, name: str) -> Any:
    return next(p.default for p in row.params if p.name == name)


def expected(row: Kind, sample: Sample) -> dict[str, Any]:
    """What the node's arguments have to be, by the signature alone."""
    full = {p.name: sample.get(p.name, p.default) for p in row.params}
    for text in row.sizes:
        name, _, fallback = text.partition("=")
        value = full[name] if full[name] is not None or not fallback else full[fallback]
        full[name] = (
            value if isinstance(value, str) else (value,) * row.rank if isinstance(value, int) else tuple(value)
        )
    if row.rank:
        full = {
            k: v * row.rank if isinstance(v, tuple) and len(v) == 1 and k in row_sizes(row) else v
            for k, v in full.items()
        }
    return full


def row_sizes(row: Kind) -> set[str]:
    return {text.partition("=")[0] for text in row.sizes}


def plain(node: Node, graph: Graph) -> dict[str, Any]:
    """A node's arguments, comparable between forms: tensors by what they are, lists as tuples."""

    def one(value: Any) -> Any:
        match value:
            case Load(_, _, shape):
                return "weight", shape
            case Ref():
                return "value"
            case _ if hasattr(value, "items") and isinstance(value.items, tuple):
                return tuple(map(one, value.items))
            case tuple():
                return tuple(map(one, value))
            case SliceArg(start, stop, step):
                return slice(start, stop, step)
            case _ if hasattr(value, "name"):
                return resolve(value.name)
        return value

    return {name: one(value) for name, value in node.args}


def comparable(value: Any, weight: bool) -> Any:
    if isinstance(value, Tensor):
        return ("weight", tuple(value.shape)) if weight else "value"
    return tuple(comparable(item, weight) for item in value) if isinstance(value, (tuple, list)) else value


def shares_memory(result: Any, operand: Tensor) -> bool:
    first = result if isinstance(result, Tensor) else result[0]
    return first.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()


def erased(graph: Graph, id: str) -> Graph:
    node = graph[id]
    return replace(graph, nodes=pmap({**graph.nodes, id: replace(node, origin=Origin())}))


CASES = [(row, form) for row in KINDS for form in row.forms]


@pytest.mark.parametrize(("row", "form"), CASES, ids=[f"{r.name}-{f.op}-{f.target}" for r, f in CASES])
def test_form(row: Kind, form: Form) -> None:
    said = 0
    for sample in SAMPLES[row.name]:
        for model in spellings(row, form, sample):
            inputs = operands(sample)
            state = {k: v.clone() for k, v in model.state_dict().items()}
            with torch.no_grad():
                try:
                    with warnings.catch_warnings():
                        warnings.filterwarnings("error", "dropout.d: Received a", UserWarning)
                        wanted = model(*inputs)
                except (TypeError, UserWarning):  # not by keyword, not in a tuple, not for this rank
                    continue
                except RuntimeError as error:
                    if "Expected" in str(error):  # an input of another rank
                        continue
                    raise
                except ValueError as error:
                    if re.match(r"expected \dD or \dD input", str(error)):
                        continue
                    raise
            model.load_state_dict(state)
            graph = unwrap(trace(nn.Sequential(model) if form.op == "call_module" else model))
            (node,) = [n for n in graph if n.kind not in ("placeholder", "output", "get_attr", ".clone")]
            assert node.kind == row.name, f"{form.target} is {node.kind} for {sample.keys()}"
            want = {k: comparable(v, k in row.weights) for k, v in expected(row, sample).items()}
            assert plain(node, graph) == want
            assert row.name in VIEWS or not shares_memory(wanted, inputs[0]), "its result may be a view"
            said += 1
            for version in (graph, erased(graph, node.id)):
                with torch.no_grad():
                    assert same_bits(unwrap(materialize(version))(*inputs), wanted), sample.keys()
    assert said, "no sample fits this form"


@pytest.mark.parametrize("key", FORMS, ids="-".join)
def test_targets_are_canonical(key: tuple[str, str]) -> None:
    op, target = key
    if op == "call_method":
        assert callable(getattr(Tensor, target))
    else:
        found = resolve(target)
        assert FORMS[op, name_of(found)][0] is FORMS[key][0]


def test_rows_are_consistent() -> None:
    assert len({row.name for row in KINDS}) == len(KINDS)
    assert sum(len(row.forms) for row in KINDS) == len(FORMS), "a form is listed twice"
    for row in KINDS:
        names = {p.name for p in row.params}
        assert {*row.weights, *row_sizes(row), *row.tensors} <= names
        for target, args in (row.call, row.full_call):
            assert not target or callable(resolve(target))
            assert {arg.rstrip("=") for arg in args} <= names
        for form in row.forms:
            assert {p.name for p in form.params if p.how in ("plain", "spread")} <= names
            assert {name for name, _ in form.fixed} <= names
            if form.emit:
                assert (form.op, form.emit) in FORMS


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        lambda x: x.view(torch.int32),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.add(x, x, out=x.clone()),
        lambda x: torch.sigmoid(x, out=x.clone()),
        lambda x: x.to(memory_format=torch.channels_last).flatten(1),
        lambda x: F.avg_pool2d(x, x.size()[2:]),
        lambda x: F.avg_pool2d(x, x.size(2)),
        lambda x: F.adaptive_avg_pool2d(x, x.shape[-2:]),
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1],
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: torch.stack(torch.unbind(x, 1), 2),
        lambda x: F.embedding((x > 0).long(), x[0, 0] * 5, None, 1.0),
        lambda x: F.embedding((x > 0).long(), x[0, 0], norm_type=1.0),
        lambda x: torch.repeat_interleave((x > 0).long().flatten()),
    ],
)  # fmt: skip
def test_what_means_something_else_is_left_alone(call) -> None:
    model = type("M", (nn.Module,), {"forward": lambda self, x: call(x)})()
    x = t(1, 2, 4, 4)
    for graph in (unwrap(trace(model, (x,))), unwrap(trace(model))):
        assert [node for node in graph if node.kind not in BY_NAME and node.kind not in ("placeholder", "output")]
        assert same_bits(unwrap(materialize(graph))(x), model(x))


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda x: 1.5 - x, "sub"),
        (lambda x: 2 / x, "div"),
        (lambda x: 7 // x, "floor_divide"),
        (lambda x: x.size(1) - x, "sub"),
        (lambda x: F.layer_norm(x, x.shape[2:]), "layer_norm"),
        (lambda x: F.layer_norm(x, (x.size(-1),)), "layer_norm"),
        (lambda x: F.pad(x, [x.size(2) - 3, 0]), "pad"),
        (lambda x: x.expand(x.shape), "expand"),
        (lambda x: x.expand(2, *[x.size(axis) for axis in (1, 2, 3)]), "expand"),
        (lambda x: x.repeat(2, x.size(1), 1, 1), "repeat"),
        (lambda x: F.interpolate(x, size=x.shape[2:]), "interpolate"),
        (lambda x: x[:, : x.size(1) // 2], "getitem"),
        (lambda x: x[x.size(0) - 1], "getitem"),
        (lambda x: x.unflatten(1, (x.size(1), 1)), "unflatten"),
        (lambda x: x.narrow(1, 0, x.size(1) - 1), "narrow"),
    ],
)  # fmt: skip
def test_operands_and_sizes_that_the_graph_computes(call, kind: str) -> None:
    model = type("M", (nn.Module,), {"forward": lambda self, x: call(x)})()
    x = t(1, 2, 4, 4)
    for graph in (unwrap(trace(model, (x,))), unwrap(trace(model))):
        *_, node, _ = graph
        assert node.kind == kind
        assert node.id not in non_tensors(graph)
        assert {used for used in node.uses() if used != "x"} <= non_tensors(graph)
        assert same_bits(unwrap(materialize(graph))(x), model(x))


class Upscale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor, size: list[int] | None) -> Tensor:
        return self.up(x, size) + self.up(x, output_size=size)


@pytest.mark.parametrize(("size", "kind"), [(None, "conv_transpose2d"), ([10, 9], "torch.nn.ConvTranspose2d")], ids=str)
def test_a_transposed_convolution_to_a_given_size_is_left_alone(size: list[int] | None, kind: str) -> None:
    class Sized(Upscale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, size)

    model, x = Sized(), t(2, 4, 4, 4)
    graph = unwrap(trace(model, (x,)))
    assert [node.kind for node in graph][1:-1] == [kind, kind, "add"]
    with torch.no_grad():
        assert same_bits(unwrap(materialize(graph))(x), model(x))
