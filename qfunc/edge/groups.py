"""The groups of module names given to `fuse_modules`, and what is wrong with them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from qfunc.config.arguments import shown
from qfunc.edge.hooks import unmovable
from qfunc.errors import BadConfig, CannotFuse, Problem, UnknownName

Groups: TypeAlias = tuple[tuple[str, ...], ...]

_LIST = "pass a list of dotted names, such as ['conv', 'bn', 'relu'], or a list of such lists"
_ONCE = "name each module once, in the group of the modules that follow each other"
_PLAIN = frozenset(vars(nn.Module()))


def groups_of(modules_to_fuse: object) -> Groups | BadConfig:
    """One list of names, or several, as groups."""
    if not isinstance(modules_to_fuse, (list, tuple)):
        return BadConfig("modules_to_fuse", f"expected a list, got {shown(modules_to_fuse)}", _LIST)
    if not modules_to_fuse:
        return BadConfig("modules_to_fuse", "it is empty", _LIST)
    if all(isinstance(name, str) for name in modules_to_fuse):
        return (tuple(modules_to_fuse),)
    for group in modules_to_fuse:
        if not isinstance(group, (list, tuple)) or not all(isinstance(name, str) for name in group):
            return BadConfig("modules_to_fuse", f"expected a list of str in it, got {shown(group)}", _LIST)
    return tuple(map(tuple, modules_to_fuse))


def group_problems(model: nn.Module, groups: Groups) -> Iterator[Problem]:
    """All that is wrong with the names, with the places of the modules in the model, and with their hooks."""
    paths: defaultdict[int, list[str]] = defaultdict(list)
    known = {path: m for path, m in model.named_modules(remove_duplicate=False) if path}
    for path, module in (("", model), *known.items()):
        paths[id(module)].append(path)
    listed = [name for group in groups for name in group]
    yield from _sizes(groups)
    yield from (UnknownName(name, "module", tuple(known)) for name in dict.fromkeys(listed) if name not in known)
    yield from _repeated(listed, known)
    held = _held(model, {id(known[name]) for name in listed if name in known})
    for group in groups:
        if all(name in known for name in group):
            yield from _shared(group, {"": model, **known}, paths)
            yield from _bound(group, {"": model, **known}, held)
            yield from unmovable([known[name] for name in group], group)
            yield from _apart(group, {"": model, **known})


def _apart(group: Sequence[str], known: Mapping[str, nn.Module]) -> Iterator[Problem]:
    """Modules of one plain `nn.Sequential`, whose order is known, that do not follow each other in it."""
    parents, leaves = {name.rpartition(".")[0] for name in group}, [name.rpartition(".")[2] for name in group]
    if len(parents) != 1 or type(parent := known[min(parents)]) is not nn.Sequential:
        return
    children = list(parent._modules)
    first = children.index(leaves[0])
    if children[first : first + len(leaves)] != leaves:
        reason = f"they do not follow each other in {min(parents) or 'the model'}, an nn.Sequential"
        yield CannotFuse(" + ".join(group), reason, "list modules that are called one right after the other")


def _bound(
    group: Sequence[str], known: Mapping[str, nn.Module], held: Mapping[int, Sequence[str]]
) -> Iterator[Problem]:
    """References to the modules that would not be replaced: compiled code, plain attributes."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in (known[""], *_on_the_way(group, known))):
        remedy = "fuse the model before it is scripted"
        yield CannotFuse(" + ".join(group), "it is compiled by TorchScript: no part can be replaced", remedy)
    for name in group:
        for place in held.get(id(known[name]), ()):
            reason = f"{name} is also held by the attribute {place}, which would not be replaced"
            yield CannotFuse(" + ".join(group), reason, "leave it out, or keep the module in one place only")


def _on_the_way(group: Sequence[str], known: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules of the group and all that contain them, but for the model."""
    for name in group:
        parts = name.split(".")
        yield from (known[".".join(parts[: end + 1])] for end in range(len(parts)))


def _sizes(groups: Groups) -> Iterator[Problem]:
    for index, group in enumerate(groups):
        if len(group) < 2:
            place = f"modules_to_fuse[{index}]" if len(groups) > 1 else "modules_to_fuse"
            what = f"a group of one module, {group[0]!r}" if group else "an empty group"
            yield BadConfig(place, f"{what}: it takes two to fuse", _LIST)


def _repeated(listed: Sequence[str], known: Mapping[str, nn.Module]) -> Iterator[Problem]:
    """Names that are listed twice, that stand for one module, or that lie within another."""
    first: dict[int, str] = {}
    for name, times in Counter(listed).items():
        if times > 1:
            yield BadConfig(name, f"it is listed {times} times", _ONCE)
        if name not in known:
            continue
        other = first.setdefault(id(known[name]), name)
        if other != name:
            yield BadConfig(name, f"it is the same module as {other!r}, which is listed too", _ONCE)
        outer = [outer for outer in listed if name.startswith(f"{outer}.")]
        if outer:
            yield BadConfig(name, f"it is a part of {outer[0]!r}, which is listed too", _ONCE)


def _shared(
    group: Sequence[str], known: Mapping[str, nn.Module], paths: Mapping[int, Sequence[str]]
) -> Iterator[Problem]:
    """Modules that have another place in the model than the one in which the group is called.

    The group is called by the container that holds all of it. That may have several names, as long as each module of
    the group is below it once, and nowhere else: otherwise what is replaced here would be missing, or fused, there.
    """
    container = _common(group)
    for name in group:
        inner = name.removeprefix(f"{container}.") if container else name
        expected = {f"{path}.{inner}" if path else inner for path in paths[id(known[container])]}
        others = [path for path in paths[id(known[name])] if path not in expected]
        if others:
            reason = f"{name} is the same module as {', '.join(others)}, where it would be replaced or missing"
            yield CannotFuse(" + ".join(group), reason, "give each place a module of its own, or leave it out")


def _common(group: Sequence[str]) -> str:
    """The path of the innermost module that holds all of the group.

    >>> _common(["a.b.conv", "a.b.relu"]), _common(["a.b.conv", "a.relu"]), _common(["conv", "relu"])
    ('a.b', 'a', '')
    """
    common: list[str] = []
    for names in zip(*(name.split(".")[:-1] for name in group), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


def _held(model: nn.Module, wanted: set[int]) -> dict[int, list[str]]:
    """Plain attributes, also lists and dicts, that hold wanted modules: such references outlive a replacement."""
    found: dict[int, list[str]] = {}
    for path, owner in model.named_modules():
        for name, value in vars(owner).items():
            if name not in _PLAIN:
                for module in _modules_in(value, depth=3):
                    if id(module) in wanted:
                        found.setdefault(id(module), []).append(f"{path}.{name}" if path else name)
    return found


def _modules_in(value: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)
