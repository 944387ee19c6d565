"""Where qfunc's sites differ from torch.ao's on purpose: each cause, why, and the models it concerns.

A cause is a function from what torch.ao quantizes to what it would quantize without the flaw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx

from tests.parity.structure import Group, Quantized, Structure, described


class Cause(NamedTuple):
    """`mended` is torch.ao's side without the flaw; `models` are all those that it makes a difference for."""

    reason: str
    mended: Callable[[Structure, Quantized], Quantized]
    models: frozenset[str]
    backends: frozenset[str] = frozenset()
    """Those that it makes a difference for; empty for all."""

    def concerns(self, model: str, backend: str) -> bool:
        return model in self.models and (not self.backends or backend in self.backends)


def _joined(sides: Structure, theirs: Quantized) -> Quantized:
    """The operands and the result of what runs on integers with one range have one observer."""
    same = {id(module): id(module) for module in sides.their_observers.values()}
    for together in _one_range(sides):
        roots = {same[id(module)] for module in together}
        same = {key: min(roots) if root in roots else root for key, root in same.items()}
    found: dict[int, list[tuple[Any, frozenset[str]]]] = {}
    for module, values in sides.their_sites:
        found.setdefault(same[id(module)], []).append((module, values))
    return theirs._replace(groups=Counter(_united(parts) for parts in found.values()))


def _united(parts: list[tuple[Any, frozenset[str]]]) -> Group:
    """One group of several; a fixed range among them clips no other."""
    observers = [described(module) for module, _ in parts]
    measured = [observer for observer in observers if observer.fixed is None]
    return Group(frozenset().union(*(values for _, values in parts)), (measured or observers)[0])


def _one_range(sides: Structure) -> Iterator[list[Any]]:
    """The observers of what each such operator reads and writes."""
    for node in sides.their_prepared.graph.nodes:
        written = [user for user in node.users if user in sides.their_observers]
        if _shares(node) and written:
            read = [used for used in node.all_input_nodes if used in sides.their_observers]
            yield [sides.their_observers[observer] for observer in (*read, *written)]


def _without(theirs: Quantized, values: Iterable[str], layers: Iterable[str] = ()) -> Quantized:
    gone, without_weight = frozenset(values), frozenset(layers)
    kept = (Group(group.values - gone, group.observer) for group in theirs.groups.elements())
    weights = frozenset(weight for weight in theirs.weights if weight[0] not in without_weight)
    return Quantized(Counter(group for group in kept if group.values), weights)


def _numbers_left(sides: Structure, theirs: Quantized) -> Quantized:
    """Inputs that are numbers are not observed."""
    names = [node.name for node in sides.their_prepared.graph.nodes if node.op == "placeholder"]
    given = dict(zip(names, sides.graphs.inputs, strict=False))
    return _without(theirs, (name for name in names if isinstance(given.get(name, 0.0), float)))


def _aliases_left(sides: Structure, theirs: Quantized) -> Quantized:
    """Operators whose memory is changed in place are left alone, and those that read such memory."""
    traced = sides.graphs.traced
    left = {node.id for node in traced if node.aliased or any(traced[used].aliased for used in node.uses())}

    def only_there(observer: fx.Node) -> bool:
        readers = [user.name for user in observer.users if user not in sides.their_observers]
        return sides.observed(observer) in left or (bool(readers) and left.issuperset(readers))

    return _without(theirs, [sides.observed(o) for o in sides.their_observers if only_there(o)], left)


def _reshapes_observed(sides: Structure, theirs: Quantized) -> Quantized:
    """What an operator reads of a float value's reshape is observed, where that operator runs on integers."""
    groups = Counter(theirs.groups)
    for node in sides.their_prepared.graph.nodes:
        first = _reuses(node) and not any(_reuses(used) or _shares(used) for used in node.all_input_nodes)
        if first and not _is_observed(sides, node):
            chain, readers = [node], list(node.users)
            while readers:
                reader = readers.pop()
                if _shares(reader) or _reuses(reader):
                    chain.append(reader)
                    readers += reader.users
            last = [reader for link in chain for reader in link.users if reader not in chain]
            observers = {sides.their_inputs(reader) for reader in last} - {None}
            groups.update(Group(frozenset(link.name for link in chain), observer) for observer in observers)
    return theirs._replace(groups=groups)


def _fixed_only_where_meant(sides: Structure, theirs: Quantized) -> Quantized:
    """Values are measured that do not have the range known beforehand which an observer has."""
    measured, others = list[Group](), list[Group]()
    nodes = {node.name: node for node in sides.their_prepared.graph.nodes}
    for group in theirs.groups.elements():
        own = [nodes[value] for value in group.values if not _shares(nodes[value])]
        meant = group.observer.fixed is None or all(map(sides.is_fixed, own))
        (others if meant else measured).append(group)
    for values, _ in measured:
        alike = [group for group in others if group.observer == sides.their_usual and group.values & values]
        others = [group for group in others if group not in alike]
        others.append(Group(values.union(*(group.values for group in alike)), sides.their_usual))
    return theirs._replace(groups=Counter(others))


def _shares(node: fx.Node) -> bool:
    return _meant(node).get("input_output_share_observers", False)


def _reuses(node: fx.Node) -> bool:
    return _meant(node).get("reuse_input_obs_or_fq", False)


def _meant(node: fx.Node) -> Any:
    """What torch.ao notes of a node before it inserts observers."""
    return node.meta.get("target_dtype_info") or {}


def _is_observed(sides: Structure, node: fx.Node) -> bool:
    return any(user in sides.their_observers for user in node.users)


CAUSES = {
    "sharing is not transitive": Cause(
        "An operator that runs on integers with one range reads and writes with different observers: the reference "
        "points those of a concatenation's operands elsewhere, and not what shared them before.",
        _joined,
        frozenset({"unet", "TestHelperModules.Conv2dWithTwoCat", "vit_b_16"}),
    ),
    "a known range is given to other values": Cause(
        "What has a range known beforehand, a sigmoid, say, has its operand clipped to that range as well, where that "
        "is not observed yet; and so is what is concatenated with its result.",
        _fixed_only_where_meant,
        frozenset({"SigmoidOfInput", "SigmoidBesideAnother"}),
        frozenset({"native", "fbgemm", "x86", "qnnpack", "onednn"}),
    ),
    "numbers are observed": Cause(
        "A number among the inputs is observed like a tensor, and the observer fails when it is called with one.",
        _numbers_left,
        frozenset({"many_inputs"}),
    ),
    "a float value's reshape counts as quantized": Cause(
        "A reshape, which the default configuration tells to reuse its input's range, counts as quantized also where "
        "its input is float, so that the layer that reads it is given float.",
        _reshapes_observed,
        frozenset({"sizes"}),
        frozenset({"native", "fbgemm", "x86", "qnnpack", "onednn"}),
    ),
    "aliases are observed": Cause(
        "An operator that writes in place is given an observed copy, so that its effect on aliases is lost.",
        _aliases_left,
        frozenset({"aliased"}),
    ),
}
"""In the order in which they are applied."""
