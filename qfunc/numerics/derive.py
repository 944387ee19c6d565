"""Qparams that code of the user's gives: what is wrong with them, and those that a function makes of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qfunc.errors import told
from qfunc.numerics.qparams import FLOAT_QPARAMS, QParams, QuantSpec, middle, validate

_TINY = torch.finfo(torch.float32).tiny


def derived_qparams(
    function: Callable[[tuple[QParams, ...]], QParams], of: tuple[QParams, ...], spec: QuantSpec
) -> QParams | str:
    """The qparams for `spec` that a function makes of copies of others, or in words how it failed.

    >>> half = QParams(torch.tensor(0.5), torch.tensor(0), QuantSpec("int8", -128, 127, "per_tensor_symmetric"))
    >>> wide = QuantSpec("int32", -(2**31), 2**31 - 1, "per_tensor_symmetric")
    >>> product = lambda of: QParams(of[0].scale * of[1].scale, torch.tensor(0), wide)
    >>> derived_qparams(product, (half, half), wide).scale
    tensor(0.2500)
    >>> derived_qparams(lambda of: 3, (half,), wide)
    'the function that derives its qparams gave a int, not QParams'
    """
    copies = tuple(QParams(q.scale.clone(), q.zero_point.clone(), q.spec) for q in of)
    who = "the function that derives its qparams"
    try:
        made = function(copies)
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return f"{who} raised {told(error)}"
    if not isinstance(made, QParams):
        return f"{who} gave a {type(made).__name__}, not QParams"
    if made.spec != spec:
        return f"{who} gave qparams for {made.spec}, not for {spec}"
    wrong = wrong_qparams(made)
    if not wrong and spec.symmetric and bool((made.zero_point != middle(spec)).any()):
        wrong = f"its scheme is symmetric and its zero point not {middle(spec)}"
    return f"{who} gave qparams that cannot be meant: {wrong}" if wrong else plain(made)


def plain(qparams: QParams) -> QParams:
    """Qparams that can be meant, in the shapes and types that qparams have.

    >>> plain(QParams(torch.tensor([0.5]), torch.tensor([3.0]), QuantSpec())).zero_point
    tensor(3)
    """
    shape = (-1,) if qparams.spec.per_channel else ()
    dtype = torch.float32 if qparams.spec.qscheme == FLOAT_QPARAMS else torch.int64
    scale, zero_point = qparams.scale.detach().to(torch.float32), qparams.zero_point.detach().to(dtype)
    return QParams(scale.reshape(shape), zero_point.reshape(shape), qparams.spec)


def wrong_qparams(qparams: QParams, spec: QuantSpec | None = None) -> str:
    """Why qparams cannot be meant, or are not for `spec`, in words; empty where they can.

    >>> wrong_qparams(QParams(torch.tensor(0.0), torch.tensor(3), QuantSpec()))
    'a scale is no positive, normal number: 0.0'
    """
    if not isinstance(qparams.spec, QuantSpec):
        return f"their spec is a {type(qparams.spec).__name__}, not a QuantSpec"
    if spec is not None and qparams.spec != spec:
        return f"they are for {qparams.spec}, not for {spec}"
    return next(_problems(qparams), "")


def _problems(qparams: QParams) -> Iterator[str]:
    spec, scale, zero_point = qparams.spec, qparams.scale, qparams.zero_point
    yield from (problem.reason for problem in validate(spec))
    if not (isinstance(scale, Tensor) and isinstance(zero_point, Tensor)):
        yield "the scale and the zero point are not both tensors"
        return
    if scale.is_meta or zero_point.is_meta or zero_point.dtype == torch.bool:
        yield f"the scale or the zero point holds no numbers: {scale.device}, {_told(zero_point)}"
        return
    if not scale.is_floating_point() or scale.numel() != zero_point.numel():
        yield f"the scale is {_told(scale)}, the zero point {_told(zero_point)}"
        return
    if spec.per_channel and scale.dim() != 1:
        yield f"there are no scales per channel: ch_axis {spec.ch_axis} is no axis of its values"
    elif not spec.per_channel and scale.numel() != 1:
        yield f"there are {scale.numel()} scales, {spec.qscheme} has one"
    yield from _wrong_values(qparams)


def _wrong_values(qparams: QParams) -> Iterator[str]:
    spec, scale, zero_point = qparams.spec, qparams.scale, qparams.zero_point
    wrong = scale[~(torch.isfinite(scale) & (scale >= _TINY))].view(-1)
    if wrong.numel():
        yield f"a scale is no positive, normal number: {wrong[0].item()}"
    if spec.qscheme == FLOAT_QPARAMS:
        if not torch.isfinite(zero_point).all():
            yield "a zero point is no number"
    elif (zero_point != zero_point.round()).any():
        yield "a zero point is no integer"
    elif ((zero_point < spec.quant_min) | (zero_point > spec.quant_max)).any():
        yield f"a zero point is not in {spec.quant_min}..{spec.quant_max}"


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
