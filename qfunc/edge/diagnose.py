"""Why a module cannot be traced: from the exception of `torch.fx` to a place, a cause and ways out.

Symbolic tracing runs the user's forward on proxies, which record what is done to them. What fails is whatever asks a
proxy for a plain Python value, and the exception then says what Python missed, not what the user wrote. So three
witnesses are heard: the message, the syntax of the expression that was running (code positions lead to it), and the
traced value that was asked, which is found in torch's own frames. The first rule of `causes` that fits gives the
verdict, and what no rule knows is an ordinary error of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from qfunc.edge.causes import CAUSES, ORDINARY
from qfunc.edge.scene import Scene, read_scene
from qfunc.errors import Untraceable


def diagnose(error: Exception, root: nn.Module) -> Untraceable:
    """Say where, why and what to do, for an `error` that symbolically tracing `root` raised.

    `node` is the user's innermost line, "layers.1 at model.py:12" (without the path for `root` itself, and the first
    line of its forward when no line of the user's was running). An exception that hides another one (`raise ... from`)
    is looked through. Nothing is run or changed; `error` must still carry its traceback.

    >>> from torch import fx
    >>> class Gate(nn.Module):
    ...     def forward(self, x):
    ...         return x if x.sum() > 0 else -x
    >>> try:
    ...     _ = fx.Tracer().trace(Gate())
    ... except fx.proxy.TraceError as error:
    ...     verdict = diagnose(error, Gate())
    >>> verdict.source, verdict.cause
    ('return x if x.sum() > 0 else -x', "control flow that depends on a tensor's values")
    """
    scenes = [read_scene(link, root) for link in _chain(error)]
    verdicts = ((scene, rule) for scene in scenes for rule in CAUSES if all(test(scene) for test in rule.tests))
    scene, rule = next(verdicts, (scenes[0], ORDINARY))
    words = _wordings(scene)
    ways = [way for way in (text.format_map(words) for text in rule.remedies) if way]
    place = f"{scene.path} at {scene.place}" if scene.path else scene.place
    return Untraceable(place, scene.source, rule.cause.format_map(words), "; or ".join(ways))


def _wordings(scene: Scene) -> dict[str, str]:
    """The variable parts of the rules' texts."""
    leaf = (
        f"keep the module {scene.path!r} whole: CustomConfig(non_traceable_names=({scene.path!r},))"
        if scene.path
        else "move this code into a submodule and keep that whole (CustomConfig's non_traceable_names)"
    )
    wrap = f", or the function with torch.fx.wrap({scene.function!r}) at the top of its file" if scene.function else ""
    config = f"CustomConfig(concrete_args={{{scene.input!r}: <its value>}})"
    fix = f"fix this input if it is no tensor: {config}" if scene.input else ""
    error = type(scene.error).__name__ + (f": {scene.message}" if scene.message else "")
    return {"leaf": leaf + wrap, "fix": fix, "input": scene.input, "error": error}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and those it hides, outermost first."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
