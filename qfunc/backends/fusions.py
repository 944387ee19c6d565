"""The chains that the reference's backends fuse, in the ways of writing that each of them lists.

What the reference does in two steps is one chain here: a linear layer with its batch norm folded in is a linear layer
to the patterns that it observes as one, so that the activation behind it is not observed apart. Chains that it cannot
fuse for training are for evaluation only; there the layer before them is fused as far as it goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from qfunc.match import Pattern, Step

F = "torch.nn.functional"

# `y += x` is traced by the reference as operator.add.
ADDS = frozenset({"operator.add", "operator.iadd", "torch.add"})
MULS = frozenset({"operator.mul", "operator.imul", "torch.mul"})
SUBS = frozenset({"operator.sub", "operator.isub", "torch.sub"})
RELUS = frozenset({"torch.nn.ReLU", f"{F}.relu"})
LEAKY_RELUS = frozenset({"torch.nn.LeakyReLU", f"{F}.leaky_relu"})
TANHS = frozenset({"torch.nn.Tanh", "torch.tanh"})


def modules(*names: str) -> frozenset[str]:
    """The forms of classes of `torch.nn`.

    >>> sorted(modules("Conv2d", "Linear"))
    ['torch.nn.Conv2d', 'torch.nn.Linear']
    """
    return frozenset(f"torch.nn.{name}" for name in names)


def functions(*names: str) -> frozenset[str]:
    """The forms of functions of `torch.nn.functional`, also of those that it only passes on from `torch`."""
    return frozenset(f"{place}.{name}" for place in (F, "torch") for name in names)


def _chain(*steps: Step, trains: bool = True) -> Pattern:
    return Pattern(" + ".join(step.kinds[0] for step in steps), steps, trains)


def _conv(rank: int) -> Step:
    return Step((f"conv{rank}d",), modules(f"Conv{rank}d"))


def _norm(rank: int) -> Step:
    return Step(("batch_norm",), modules(f"BatchNorm{rank}d"))


_RELU = Step(("relu",), RELUS)
_LINEAR = Step(("linear",), modules("Linear"))
_ANY_LINEAR = replace(_LINEAR, forms=modules("Linear") | functions("linear"))


def convolutions(*ranks: int) -> tuple[Pattern, ...]:
    """Convolutions with what follows: batch norm and ReLU."""
    found = []
    for rank in ranks:
        conv, norm = _conv(rank), _norm(rank)
        any_conv = replace(conv, forms=conv.forms | functions(f"conv{rank}d"))
        found += [_chain(conv, norm, _RELU), _chain(conv, norm), _chain(any_conv, _RELU)]
    return tuple(found)


def transposed(*ranks: int, unless: Mapping[int, Step] = MappingProxyType({})) -> tuple[Pattern, ...]:
    """Transposed convolutions with batch norm, for each rank unless something follows that a norm is fused with.

    The reference looks for chains from the end of the graph, and so finds a norm with its ReLU first.
    """
    convs = ((rank, Step((f"conv_transpose{rank}d",), modules(f"ConvTranspose{rank}d"))) for rank in ranks)
    chains = ((rank, _chain(conv, _norm(rank), trains=False)) for rank, conv in convs)
    return tuple(replace(chain, unless=(unless[rank],) if rank in unless else ()) for rank, chain in chains)


def linears() -> tuple[Pattern, ...]:
    """Linear layers with batch norm and ReLU."""
    norm = _norm(1)
    return _chain(_LINEAR, norm, _RELU, trains=False), _chain(_LINEAR, norm), _chain(_ANY_LINEAR, _RELU)


def norms(*ranks: int) -> tuple[Pattern, ...]:
    """Batch norms with ReLU."""
    return tuple(_chain(_norm(rank), _RELU) for rank in ranks)


def binaries(*kinds: str) -> tuple[Pattern, ...]:
    """Sums, differences and products with ReLU."""
    relu, forms = replace(_RELU, forms=RELUS | {"torch.relu"}), {"add": ADDS, "sub": SUBS, "mul": MULS}
    return tuple(_chain(Step((kind,), forms[kind]), relu) for kind in kinds)


def curved_linears() -> tuple[Pattern, ...]:
    """Linear layers with leaky ReLU or tanh."""
    found = []
    for activation in (Step(("leaky_relu",), LEAKY_RELUS), Step(("tanh",), TANHS)):
        found += [_chain(_LINEAR, _norm(1), activation, trains=False), _chain(_ANY_LINEAR, activation)]
    return tuple(found)


def sums() -> tuple[Pattern, ...]:
    """2d convolutions with a sum behind them, on whichever side, and a ReLU that is a module."""
    conv, norm = _conv(2), _norm(2)
    add = Step(("add",), ADDS, takes=("input", "other"), arity=2)
    relu = Step(("relu",), modules("ReLU"))
    with_norm = (_chain(conv, norm, add, relu, trains=False), _chain(conv, norm, add, trains=False))
    return (*with_norm, _chain(conv, add, relu), _chain(conv, add))


_TRANSPOSED = transposed(1, 2, 3, unless={2: _RELU, 3: _RELU})

NATIVE_FUSIONS = (*convolutions(1, 2, 3), *_TRANSPOSED, *linears(), *norms(2, 3), *binaries("add", "mul"))
"""Of native, fbgemm, x86 and qnnpack."""

ONEDNN_FUSIONS = (*NATIVE_FUSIONS, *curved_linears(), *sums())

TENSORRT_FUSIONS = (*convolutions(1, 2, 3), *transposed(1, 2, 3), *linears(), *binaries("add", "mul"))

EXECUTORCH_FUSIONS = (*convolutions(2), *binaries("add", "sub", "mul"))
