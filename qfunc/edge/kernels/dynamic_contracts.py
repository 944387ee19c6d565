"""The contracts of layers that read floats: quantized or cast as the model runs, or with weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc.edge.kernels.contract import Contract, Sample
from qfunc.edge.kernels.dynamic import OnednnLinearDynamic
from qfunc.edge.kernels.embedding import CodesEmbedding, CodesEmbeddingBag
from qfunc.edge.kernels.grid import QuantizeDynamically
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.edge.kernels.recurrent_int8 import Mode, RecurrentCall, RecurrentDynamic
from qfunc.edge.kernels.weight_only import Int8WeightLinear, OnednnLinearFloat16
from qfunc.edge.kernels.weighted_contracts import apply_post_op, weights
from qfunc.engines.dynamic import FloatCall
from qfunc.ir import Ref
from qfunc.numerics.qparams import (
    INT8,
    INT8_SYMMETRIC,
    UINT4_FLOAT_QPARAMS,
    UINT8,
    UINT8_FLOAT_QPARAMS,
    UINT8_REDUCED,
    QParams,
    QuantSpec,
)
from qfunc.numerics.saturation import PairLayouts

_SHAPES = (((3, 8), 5), ((1, 64), 32), ((2, 5, 33), 7), ((16, 3), 16), ((0, 4), 3))
_SPECS = (UINT8, INT8, UINT8_REDUCED, INT8_SYMMETRIC)
_PLAIN = FloatCall("linear", (("input", Ref("0")),), (), ("",), None)


@dataclass(frozen=True, slots=True)
class _Setup:
    """A kernel, and its float64 meaning."""

    kernel: nn.Module
    meaning: Callable[..., Tensor]


def _kernel(sample: Sample) -> Tensor:
    return sample.setup.kernel(*sample.tensors)  # type: ignore[no-any-return]


def _meaning(sample: Sample) -> Tensor:
    return sample.setup.meaning(*sample.tensors)  # type: ignore[no-any-return]


def _contract(name: str, samples: Callable[[], Iterator[Sample]]) -> Contract:
    return Contract(name, _kernel, _meaning, samples)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Floats of both signs, of one, all zero, and in awkward memory."""
    yield "random", torch.randn(shape, generator=generator)
    yield "positive", torch.rand(shape, generator=generator) + 3
    yield "zeros", torch.zeros(shape)
    yield "strided", torch.randn((*shape, 2), generator=generator)[..., 1]


def on_grid(x: Tensor, spec: QuantSpec) -> Tensor:
    """The float64 values that a tensor's codes stand for."""
    return QuantizeDynamically(spec)(x).double()  # type: ignore[no-any-return]


def _dynamic_samples(layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(11)
    turn = 0
    for shape, outs in _SHAPES:
        weight, scale = weights((outs, shape[-1]), layouts.dense, generator)
        real = weight.double() * scale.double()[:, None]
        for label, x in _inputs(shape, generator):
            turn += 1
            spec = _SPECS[turn % len(_SPECS)]
            bias = torch.randn(outs, generator=generator) if turn % 3 else None
            post = KernelPostOp("relu") if turn % 2 else NO_POST_OP

            def meaning(
                x: Tensor,
                spec: QuantSpec = spec,
                bias: Tensor | None = bias,
                post: KernelPostOp = post,
                real: Any = real,
            ) -> Tensor:
                return apply_post_op(post, F.linear(on_grid(x, spec), real, None if bias is None else bias.double()))

            kernel = OnednnLinearDynamic(weight, scale, bias, spec, None, post)
            yield Sample(f"{shape} -> {outs}, {spec.dtype}, {label}", (x,), _Setup(kernel, meaning), None)


def _linear_samples(make: Callable[[Tensor, Tensor], tuple[nn.Module, Tensor]]) -> Iterator[Sample]:
    """Floats against a weight; `make` gives the kernel for random floats and a bias, and the weight it stands for."""
    generator = torch.Generator().manual_seed(12)
    for shape, outs in _SHAPES:
        bias = torch.randn(outs, generator=generator)
        kernel, real = make(torch.randn(outs, shape[-1], generator=generator), bias)
        meaning = partial(lambda x, real, bias: F.linear(x.double(), real, bias), real=real, bias=bias.double())
        for label, x in _inputs(shape, generator):
            yield Sample(f"{shape} -> {outs}, {label}", (x,), _Setup(kernel, meaning), None)


def _int8(weight: Tensor, bias: Tensor) -> tuple[nn.Module, Tensor]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return Int8WeightLinear(codes, scale, bias, _PLAIN), codes.double() * scale.double()[:, None]


def _float16(weight: Tensor, bias: Tensor) -> tuple[nn.Module, Tensor]:
    return OnednnLinearFloat16(weight.half(), bias, _PLAIN), weight.half().double()


def _table_samples(*, bags: bool) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(13)
    index = torch.tensor([3, 0, 8, 8, 1, 3])
    for spec in (UINT8_FLOAT_QPARAMS, UINT4_FLOAT_QPARAMS):
        codes = torch.randint(0, spec.quant_max + 1, (9, 7), dtype=torch.uint8, generator=generator)
        qparams = QParams(torch.rand(9, generator=generator) + 0.1, torch.rand(9, generator=generator) * 9, spec)
        real = (codes.double() - qparams.zero_point[:, None].double()) * qparams.scale[:, None].double()
        if not bags:
            kernel: nn.Module = CodesEmbedding(codes, qparams, torch.float32, None)
            for each in (index, index.view(2, 3).to(torch.int32)):
                yield Sample(
                    spec.dtype, (each,), _Setup(kernel, partial(lambda i, real: real[i.long()], real=real)), None
                )
            continue
        for mode in ("sum", "mean"):
            kernel = CodesEmbeddingBag(codes, qparams, torch.float32, None, mode=mode, padding_idx=8)
            meaning = partial(F.embedding_bag, weight=real, mode=mode, padding_idx=8)
            bag = torch.tensor([0, 2, 2, 5])
            yield Sample(f"{spec.dtype} {mode}", (index, bag), _Setup(kernel, _bag(meaning)), None)


def _bag(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda index, offsets: function(index, offsets=offsets)


class _States(nn.Module):
    """All that a recurrent layer returns, as one tensor."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result, last = self.layer(x)
        return torch.cat(
            [result.flatten(), *(each.flatten() for each in (last if isinstance(last, tuple) else (last,)))]
        )


_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}


def _recurrent_samples(layouts: PairLayouts) -> Iterator[Sample]:
    """Two steps of each kind: longer ones round states that differ by float rounding to other codes."""
    generator = torch.Generator().manual_seed(14)
    modes: tuple[Mode, ...] = ("LSTM", "GRU", "RNN_TANH")
    for mode in modes:
        call = RecurrentCall(mode, 6, 4)
        shapes = {"weight_ih_l0": (4 * _GATES[mode], 6), "weight_hh_l0": (4 * _GATES[mode], 4)}
        matrices = {}
        for name, shape in shapes.items():
            codes, scale = weights(shape, layouts.dense, generator)
            matrices[name] = codes, scale * 0.3
        kernel = _States(RecurrentDynamic(call, matrices, {}, UINT8))
        real = {name: codes.double() * scale.double()[:, None] for name, (codes, scale) in matrices.items()}
        x = torch.randn(2, 3, 6, generator=generator)
        yield Sample(mode, (x,), _Setup(kernel, partial(_steps, mode, real)), None)


def _steps(mode: Mode, real: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer by torch's float64 cells, whose operands are rounded as the kernel's are."""
    hidden = cell = torch.zeros(x.shape[1], 4, dtype=torch.float64)
    results: list[Tensor] = []
    for step in on_grid(x, UINT8):
        rounded = on_grid(hidden.float(), UINT8)
        given, held = step @ real["weight_ih_l0"].T, rounded @ real["weight_hh_l0"].T
        match mode:
            case "LSTM":
                i, f, g, o = (given + held).chunk(4, 1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
            case "GRU":
                (r, z, n), (hr, hz, hn) = given.chunk(3, 1), held.chunk(3, 1)
                update = (z + hz).sigmoid()
                hidden = update * hidden + (1 - update) * (n + (r + hr).sigmoid() * hn).tanh()
            case _:
                hidden = (given + held).tanh()
        results.append(hidden)
    last = (hidden, cell) if mode == "LSTM" else (hidden,)
    return torch.cat([torch.stack(results).flatten(), *(each.flatten() for each in last)])


def dynamic_contracts(layouts: PairLayouts) -> tuple[Contract, ...]:
    """Those of oneDNN's kernels, with weights that a host with these pair layouts bears."""
    return (
        _contract("onednn.linear_dynamic", partial(_dynamic_samples, layouts)),
        _contract("onednn.linear_float16", partial(_linear_samples, _float16)),
        _contract("recurrent_dynamic", partial(_recurrent_samples, layouts)),
    )


def float_contracts() -> tuple[Contract, ...]:
    """Those of aten's operators on codes and floats."""
    return (
        _contract("int8_weight.linear", partial(_linear_samples, _int8)),
        _contract("embedding", partial(_table_samples, bags=False)),
        _contract("embedding_bag", partial(_table_samples, bags=True)),
    )
