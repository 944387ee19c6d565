"""Errors, and exceptions of the user's code, as people read them."""

from __future__ import annotations

from os.path import basename

from qfunc.errors.union import QuantError, problems, remedies


def render(error: QuantError) -> str:
    """An error as people read it: what, where, why, and what to do about it; alike problems are told together.

    >>> from qfunc.errors.model import InTrainingMode
    >>> print(render(InTrainingMode("model")))
    InTrainingMode at model
      why: it is in training mode, where batch norm follows the batch and dropout drops: neither can be folded away
      fix: call model.eval() first, and trace the model again; or fuse(graph, qat=True), to train with quantization
    """
    places: dict[tuple[str, str, str], list[str]] = {}
    found = problems(error)
    for p, remedy in zip(found, remedies(found), strict=True):
        places.setdefault((type(p).__name__, p.reason, remedy), []).append(p.node)
    return "\n".join(
        f"{name} at {_listed(nodes)}\n  why: {reason}\n  fix: {remedy}"
        for (name, reason, remedy), nodes in places.items()
    )


def _listed(nodes: list[str]) -> str:
    more = f" and {len(nodes) - 6} more" if len(nodes) > 6 else ""
    return ", ".join(nodes[:6]) + more


def told(error: BaseException) -> str:
    """An exception of the user's code in one line, with the user's innermost line that was running, if any.

    >>> told(KeyError("label"))
    "KeyError: 'label'"
    """
    lines = str(error).strip().splitlines()
    message = lines[0].removesuffix(", but expected one of:").removesuffix(":") if lines else ""
    return type(error).__name__ + (f": {message}" if message else "") + _place(error)


def _place(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        code, package = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__")).split(".")[0]
        if package not in ("torch", "qfunc") and not code.co_filename.startswith("<"):
            place = f" ({basename(code.co_filename)}:{trace.tb_lineno}, in {code.co_name})"
        trace = trace.tb_next
    return place
