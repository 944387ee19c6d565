"""The operators that random programs are made of: what each applies to, and the ways people write it.

Every row of `OPERATIONS` writes one expression over a value `x` of a draft; random choices go through `pick`, simplest
option first, so that a failing program shrinks towards plain modules with plain arguments. Dimension 0 is the batch
and no operator touches it, so that a program runs at any batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qfunc.testing import forms as written
from qfunc.testing.draft import Draft, Pick
from qfunc.testing.program import Shape

Writer: TypeAlias = Callable[[Draft, str, Pick], str]
Fits: TypeAlias = Callable[[Draft, str], bool]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operator of a `family`: `write` gives an expression for values that `fits` accepts."""

    kind: str
    family: str
    fits: Fits
    write: Writer


def _rank(*ranks: int, least: int = 1) -> Fits:
    """Values of these ranks whose trailing dimensions, from 2 on, are at least `least`."""

    def fits(draft: Draft, x: str) -> bool:
        shape = draft.shape(x)
        return len(shape) in ranks and all(size >= least for size in shape[2:])

    return fits


_ANY = _rank(2, 3, 4, 5)
_SPATIAL = _rank(3, 4, 5)


def _unary(kind: str, family: str, *forms: str, fits: Fits = _ANY) -> Operation:
    """An operator of one operand. A form that begins with "nn." is a module; others are expressions over x.

    What forms may name is said in `qfunc.testing.forms`.
    """

    def write(draft: Draft, x: str, pick: Pick) -> str:
        form = pick(forms)
        shape = draft.shape(x)
        y = pick(draft.partners(x)) if "{y}" in form else x
        text = form.format(x=x, y=y, c=shape[1], last=shape[-1], n=len(shape) - 2)
        return draft.call(text, x) if text.startswith("nn.") else text

    return Operation(kind, family, fits, write)


_WEIGHTED = ("{0}, {1}, {2}", "{0}, {1}, bias={2}", "{0}, weight={1}, bias={2}", "input={0}, weight={1}, bias={2}")


def _convolution(draft: Draft, x: str, pick: Pick) -> str:
    _, channels, *sides = draft.shape(x)
    n = len(sides)
    groups = pick([g for g in (1, channels, 2) if channels % g == 0])
    outputs = pick([o for o in (channels, 4, 2 * channels, 6) if o % groups == 0])
    kernel = pick([k for k in (1, 3, 2, 5) if k <= min(sides)])
    dilation = pick([d for d in (1, 2) if d * (kernel - 1) < min(sides)])
    paddings: list[str] = ["0", *(["'same'"] if kernel % 2 else []), str(kernel // 2), "1"]
    padding = pick(paddings)
    stride = 1 if padding == "'same'" else pick([1, 2])
    mode = pick(["zeros", *_padding_modes(padding, dilation * (kernel - 1), min(sides))])
    bias = pick([True, False])
    options = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"
    if mode == "zeros" and pick(["module", "function"]) == "function":
        weight = draft.attribute("w", _parameter(outputs, channels // groups, *(kernel for _ in sides)))
        offset = draft.attribute("b", f"nn.Parameter(torch.randn({outputs}))") if bias else "None"
        return f"F.conv{n}d({pick(_WEIGHTED).format(x, weight, offset)}, {options})"
    options += f", bias={bias}, padding_mode={mode!r}"
    return draft.call(f"nn.Conv{n}d({channels}, {outputs}, {kernel}, {options})", x)


def _transposed(draft: Draft, x: str, pick: Pick) -> str:
    _, channels, *sides = draft.shape(x)
    n = len(sides)
    groups = pick([g for g in (1, channels, 2) if channels % g == 0])
    outputs = pick([o for o in (channels, 4, 6) if o % groups == 0])
    kernel, stride, dilation = pick([2, 3, 1]), pick([1, 2, 3]), pick([1, 2])
    reach = dilation * (kernel - 1)
    padding = pick([p for p in (0, 1) if 2 * p <= reach])
    extra = pick(range(max(stride, dilation)))
    bias = pick([True, False])
    options = f"stride={stride}, padding={padding}, output_padding={extra}, groups={groups}, dilation={dilation}"
    form = pick(["module", "function", "normalized", "output size"])
    if form == "function":
        weight = draft.attribute("w", _parameter(channels, outputs // groups, *(kernel for _ in sides)))
        offset = draft.attribute("b", f"nn.Parameter(torch.randn({outputs}))") if bias else "None"
        return f"F.conv_transpose{n}d({pick(_WEIGHTED).format(x, weight, offset)}, {options})"
    layer = f"nn.ConvTranspose{n}d({channels}, {outputs}, {kernel}, {options}, bias={bias})"
    if form == "normalized":
        return draft.call(f"nn.Sequential({layer}, nn.BatchNorm{n}d({outputs}))", x)
    call = draft.call(layer, x)
    sizes = [(side - 1) * stride - 2 * padding + reach + 1 + min(extra, stride - 1) for side in sides]
    return call.replace(f"({x})", f"({x}, output_size={sizes})") if form == "output size" else call


def _padding_modes(padding: str, reach: int, side: int) -> list[str]:
    widest = (reach + 1) // 2 if padding == "'same'" else int(padding)
    return ["reflect", "replicate", "circular"] if widest < side else []


def _parameter(*size: int) -> str:
    """A weight that keeps the variance of normal inputs."""
    return f"nn.Parameter(torch.randn({size}) * {math.prod(size[1:]) ** -0.5:.3f})"


def _linear(draft: Draft, x: str, pick: Pick) -> str:
    inputs = draft.shape(x)[-1]
    outputs = pick([inputs, 4, 8, 3])
    bias = pick([True, False])
    if pick(["module", "function"]) == "module":
        return draft.call(f"nn.Linear({inputs}, {outputs}, bias={bias})", x)
    weight = draft.attribute("w", _parameter(outputs, inputs))
    offset = draft.attribute("b", f"nn.Parameter(torch.randn({outputs}))") if bias else "None"
    return f"F.linear({pick(_WEIGHTED).format(x, weight, offset)})"


def _batch_norm(draft: Draft, x: str, pick: Pick) -> str:
    shape = draft.shape(x)
    channels, n = shape[1], max(1, len(shape) - 2)
    if pick(["module", "function"]) == "module":
        options = pick(["", ", eps=0.001", ", affine=False"])
        return draft.call(f"nn.BatchNorm{n}d({channels}{options})", x)
    mean, weight, bias = (draft.attribute("b", f"nn.Buffer(0.3 * torch.randn({channels}))") for _ in range(3))
    var = draft.attribute("b", f"nn.Buffer(0.3 + torch.rand({channels}))")
    return f"F.batch_norm({x}, {mean}, {var}, {weight}, {bias}, False, 0.1, 1e-05)"


def _reshape(draft: Draft, x: str, pick: Pick) -> str:
    _, channels, *rest = draft.shape(x)
    halves = (2, channels // 2) if channels % 2 == 0 else (1, channels)
    options = [(channels * math.prod(rest),), (channels, math.prod(rest)), (*halves, math.prod(rest))]
    sizes = ", ".join(map(str, (-1, *pick(options))))
    forms = ["{x}.reshape({s})", "torch.reshape({x}, ({s}))", "{x}.reshape(({s}))"]
    return pick([*forms, "{x}.view({s})"] if draft.viewable(x) else forms).format(x=x, s=sizes)


def _permute(draft: Draft, x: str, pick: Pick) -> str:
    rank = len(draft.shape(x))
    order = ", ".join(map(str, pick([(0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))])))
    forms = ("{x}.permute({o})", "torch.permute({x}, ({o}))", "{x}.transpose(1, {r})", "torch.transpose({x}, 1, {r})")
    return pick((*forms, "{x}.transpose(-1, -2)", "{x}.permute({o}).contiguous()")).format(x=x, o=order, r=rank - 1)


_SIZES = ("{y}.reshape({x}.size(0), -1)", "torch.reshape({y}, ({x}.shape[0], -1))", "{x} / {x}.size(-1)")
_SIZES_OF_MANY = (
    "{x}.reshape({x}.shape[0], {x}.shape[1], -1)",
    "{x}.reshape({x}.size()[0], {x}.shape[1] * {x}.size(2), -1)",
    "{x} * {x}.shape[-1] ** -0.5",
)
_SIZES_OF_PARTS = (
    "{x}[:, : {x}.size(1) // 2]",
    "{x}.narrow(1, 0, {x}.shape[1] - 1)",
    "{x}.split({x}.shape[1] // 2, 1)[0]",
    "torch.chunk({x}, 2, dim=1)[1]",
)


def _size(draft: Draft, x: str, pick: Pick) -> str:
    _, channels, *rest = draft.shape(x)
    forms = [*_SIZES, *(_SIZES_OF_MANY if rest else ()), *(_SIZES_OF_PARTS if channels > 1 else ())]
    form: str = pick([*forms, "unpacked"])
    if form == "unpacked":
        names = [f"s{len(draft.body)}_{index}" for index in range(2 + len(rest))]
        draft.statement(f"{', '.join(names)} = {x}.shape")
        return f"{x}.reshape({names[0]}, {' * '.join(names[1:])}) + 0.5 * {names[-1]}"
    return form.format(x=x, y=pick(draft.latest()))


def _binary(draft: Draft, x: str, pick: Pick) -> str:
    broadcast = [y for y in draft.latest() if _broadcasts(draft.shape(y), draft.shape(x))]
    y = pick([*draft.partners(x), *broadcast])
    forms = ("{x} + {y}", "torch.add({x}, {y})", "{x}.add({y})", "{x} * {y}", "torch.mul({x}, {y})", "{x}.mul({y})")
    fused = ("F.relu({x} + {y})", "torch.relu(torch.add({x}, {y}))", "({x} * {y}).relu()")
    more = ("torch.add({x}, {y}, alpha=2)", "{x} - {y}", "torch.sub({x}, {y})", "{y} + {x}")
    return pick((*forms, *fused, *more)).format(x=x, y=y)


def _broadcasts(small: Shape, large: Shape) -> bool:
    same_rank = len(small) == len(large) and small[0] == large[0]
    return small != large and same_rank and all(a in {1, b} for a, b in zip(small, large, strict=True))


def _scalar(draft: Draft, x: str, pick: Pick) -> str:
    numbers = [name for name, _ in draft.defaults] + ["0.5", "2", "-0.25"]
    forms = ("{x} + {k}", "{k} + {x}", "torch.add({x}, {k})", "{x}.add({k})", "{x} * {k}", "{k} * {x}", "{x}.mul({k})")
    more = ("torch.mul({x}, {k})", "{x} - {k}", "{k} - {x}", "{x} / 2.0", "-{x}")
    return pick((*forms, *more, "F.relu({x} + {k})", "{x}.add(other={k})")).format(x=x, k=pick(numbers))


def _cat(draft: Draft, x: str, pick: Pick) -> str:
    shape = draft.shape(x)
    fitting = [y for y in draft.latest() if _joins(draft.shape(y), shape)]
    parts = ", ".join(pick(fitting) for _ in range(pick([1, 2])))
    forms = ("torch.cat(({x}, {p}), 1)", "torch.cat([{x}, {p}], dim=1)", "torch.concat(({p}, {x}), dim=1)")
    more = ("torch.cat(tensors=[{p}, {x}], dim=1)", "F.relu(torch.cat([{x}, {p}], 1))")
    return pick((*forms, *more)).format(x=x, p=parts)


def _joins(one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and one[0] == other[0] and one[2:] == other[2:]


_WITH_WEIGHT = ("nn.Conv", "nn.Linear")


def _calls(draft: Draft, x: str, constructors: tuple[str, ...] = ("nn.",)) -> list[tuple[str, str]]:
    """The modules that have been called on a value of the shape of `x`, each with its constructor."""
    return [(m, c) for m, c, shape in reversed(draft.calls) if shape == draft.shape(x) and c.startswith(constructors)]


def _again(draft: Draft, x: str, pick: Pick) -> str:
    """A module at one more site."""
    module, _ = pick(_calls(draft, x))
    return f"{module}({x})"


def _tied(draft: Draft, x: str, pick: Pick) -> str:
    """A second module, or a function, with the weight of the first."""
    module, constructor = pick(_calls(draft, x, _WITH_WEIGHT))
    if constructor.startswith("nn.Linear") and pick(["module", "function"]) == "function":
        return f"F.linear({x}, {module}.weight)"
    call = draft.call(constructor, x)
    path = call.removeprefix("self.").split("(")[0]
    draft.attribute("", f"{module}.weight", f"{path}.weight")
    return call


def _block(draft: Draft, x: str, pick: Pick) -> str:
    """A nested module, as in real models: its parts have dotted names."""
    shape = draft.shape(x)
    n, c, last = len(shape) - 2, shape[1], shape[-1]
    if n < 1:
        return draft.call(f"nn.Sequential(nn.Linear({last}, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, {last}))", x)
    conv, norm = f"nn.Conv{n}d({c}, {c}, 3, padding=1, bias=False)", f"nn.BatchNorm{n}d({c})"
    forms = (f"{conv}, {norm}, nn.ReLU(inplace=True)", f"{conv}, {norm}", f"{conv}, nn.ReLU6(inplace=True), {norm}")
    return draft.call(f"nn.Sequential({pick(forms)})", x)


def _repeat(draft: Draft, x: str, pick: Pick) -> str:
    ones = ["1"] * (len(draft.shape(x)) - 2)
    return pick(("{x}.repeat({s})", "{x}.repeat(({s}))")).format(x=x, s=", ".join(["1", "2", *ones]))


def _product_with_weight(draft: Draft, x: str, pick: Pick) -> str:
    inputs = draft.shape(x)[-1]
    weight, offset = draft.attribute("w", _parameter(inputs, 4)), draft.attribute("b", "nn.Parameter(torch.randn(4))")
    forms = ("torch.addmm({b}, {x}, {w})", "torch.addmm({b}, {x}, {w}, beta=0.5, alpha=2)", "{x} @ {w} + {b}")
    return pick((*forms, "torch.matmul({x}, {w})")).format(x=x, w=weight, b=offset)


def _embedding(draft: Draft, x: str, pick: Pick) -> str:
    """A table read at the signs of a value."""
    index = f"({x} > 0).long()"
    bags = len(draft.shape(x)) == 2
    form = pick(["module", "function", *(["bag", "bag function"] if bags else [])])
    if form in ("module", "bag"):
        layer = "nn.Embedding(2, 4)" if form == "module" else "nn.EmbeddingBag(2, 4, mode='sum')"
        return f"{draft.attribute('m', layer)}({index})"
    table = draft.attribute("w", _parameter(2, 4))
    return f"F.embedding({index}, {table})" if form == "function" else f"F.embedding_bag({index}, {table})"


def _shufflable(draft: Draft, x: str) -> bool:
    """Whether the channels are pixels of twice the size."""
    return len(draft.shape(x)) == 4 and draft.shape(x)[1] % 4 == 0


OPERATIONS: tuple[Operation, ...] = (
    Operation("convolution", "conv", _SPATIAL, _convolution),
    Operation("transposed convolution", "conv_transpose", _SPATIAL, _transposed),
    Operation("linear", "linear", _ANY, _linear),
    Operation("batch_norm", "norm", _ANY, _batch_norm),
    Operation("block", "block", _rank(2, 3, 4, 5), _block),
    _unary("relu", "activation", "nn.ReLU()", "F.relu({x})", "torch.relu({x})", "{x}.relu()", "F.relu(input={x})"),
    _unary("relu6", "activation", "nn.ReLU6()", "F.relu6({x})"),
    _unary("hardtanh", "activation", "nn.Hardtanh(-0.5, 2.0)", "F.hardtanh({x})", "F.hardtanh({x}, min_val=0.0)"),
    _unary(
        "clamp",
        "activation",
        "torch.clamp({x}, -1, 1)",
        "{x}.clamp(min=0.0)",
        "{x}.clamp(0, 6)",
        "torch.clip({x}, max=1)",
    ),
    _unary(
        "leaky",
        "activation",
        "nn.LeakyReLU(0.1)",
        "F.leaky_relu({x}, 0.2)",
        "F.leaky_relu({x}, negative_slope=0.3)",
        "nn.ELU()",
        "F.elu({x}, 0.5)",
    ),
    _unary(
        "smooth",
        "activation",
        "nn.SiLU()",
        "F.silu({x})",
        "nn.GELU()",
        "F.gelu({x})",
        "F.gelu({x}, approximate='tanh')",
    ),
    _unary("sigmoid", "sigmoid", "nn.Sigmoid()", "torch.sigmoid({x})", "{x}.sigmoid()", "F.sigmoid({x})"),
    _unary("hardsigmoid", "sigmoid", "nn.Hardsigmoid()", "F.hardsigmoid({x})"),
    _unary("hardswish", "sigmoid", "nn.Hardswish()", "F.hardswish({x})"),
    _unary("pool", "pool", *written.POOLS, fits=_rank(3, 4, 5, least=3)),
    _unary(
        "flatten",
        "shape",
        "nn.Flatten()",
        "torch.flatten({x}, 1)",
        "{x}.flatten(1)",
        "torch.flatten({x}, start_dim=1)",
    ),
    Operation("reshape", "shape", _ANY, _reshape),
    Operation("permute", "shape", _SPATIAL, _permute),
    _unary("unsqueeze", "shape", "{x}.unsqueeze(1)", "torch.unsqueeze({x}, -1)", fits=_rank(2, 3)),
    _unary(
        "identity",
        "identity",
        "nn.Identity()",
        "nn.Dropout(0.3)",
        "F.dropout({x}, 0.3, self.training)",
        "{x}.contiguous()",
    ),
    _unary(
        "mean",
        "mean",
        "{x}.mean(-1, keepdim=True)",
        "torch.mean({x}, dim=1, keepdim=True)",
        "torch.mean({x}, 1, True)",
    ),
    _unary("mean", "mean", "{x}.mean(2)", "{x}.mean(dim=[1])", "torch.mean({x}, (2,), keepdim=True)", fits=_SPATIAL),
    Operation("binary", "arithmetic", _ANY, _binary),
    Operation("scalar", "arithmetic", _ANY, _scalar),
    Operation("cat", "cat", _ANY, _cat),
    Operation("size", "size", _ANY, _size),
    Operation("again", "sharing", lambda draft, x: bool(_calls(draft, x)), _again),
    Operation("tied", "sharing", lambda draft, x: bool(_calls(draft, x, _WITH_WEIGHT)), _tied),
    _unary("float", "float", *written.FLOATS),
    _unary("difference", "difference", *written.DIFFERENCES),
    _unary("product", "product", *written.PRODUCTS, fits=_SPATIAL),
    _unary("batched product", "product", *written.BATCHED_PRODUCTS, fits=_rank(3)),
    Operation("product with a weight", "product", _rank(2), _product_with_weight),
    _unary("norm of each", "other norm", *written.NORMS),
    _unary("norm of groups", "other norm", *written.GROUP_NORMS, fits=lambda draft, x: draft.shape(x)[1] > 1),
    _unary("norm of each", "other norm", *written.SPATIAL_NORMS, fits=_rank(3, 4, 5, least=2)),
    _unary("softmax", "softmax", *written.SOFTMAXES),
    _unary("resize", "resize", *written.RESIZES, fits=_rank(3, 4, 5, least=2)),
    _unary("pixel shuffle", "resize", *written.PIXELS, fits=_shufflable),
    _unary("part", "part", *written.PARTS),
    _unary("part", "part", *written.SPATIAL_PARTS, fits=_rank(3, 4, 5, least=2)),
    _unary("copy", "copy", *written.COPIES),
    Operation("repeat", "copy", _ANY, _repeat),
    Operation("embedding", "embedding", _rank(2, 3), _embedding),
    _unary("curve", "curve", *written.CURVES),
)

FAMILIES: tuple[str, ...] = (*dict.fromkeys(row.family for row in OPERATIONS), "inplace")
"""The names that `families` of the strategies accepts."""
