"""Layers that compute in float with parameters of fewer bits: integers, or small floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.kernels.affine import Quantize
from qfunc.edge.kernels.base import Kernel, operator, outside_compile
from qfunc.edge.kernels.dynamic import check_features
from qfunc.edge.kernels.island import computed, filled
from qfunc.engines.dynamic import FloatCall
from qfunc.numerics.affine import dequantize
from qfunc.numerics.qparams import QParams

_int8_linear = operator("aten", "_weight_int8pack_mm")
_prepack_float16 = operator("onednn", "linear_prepack_fp16")
_linear_float16 = operator("onednn", "linear_dynamic_fp16")


class _InFloat(Kernel):
    """What these kernels share: inputs that may be cast first, post-ops computed in float, and codes as a result."""

    def __init__(self, call: FloatCall, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.call = call
        for name, value in parameters.items():
            self.register_buffer(name, value)
        self._named = tuple(parameters)
        self._casts = tuple(getattr(torch, cast) if cast else None for cast in call.casts)
        self._out_of = nn.Identity() if call.output is None else Quantize(call.output)

    def forward(self, *inputs: Any) -> Tensor:
        """The layer's result on floats."""
        values = [
            x if cast is None else x.to(cast).to(torch.float32) for cast, x in zip(self._casts, inputs, strict=True)
        ]
        named = {name: filled(arg, values) for name, arg in self.call.args}
        result = self._computed(named | {name: getattr(self, name) for name in self._named})
        for post in self.call.posts:
            result = computed(post.kind, {"input": result, **{name: filled(arg, values) for name, arg in post.args}})
        floats: Tensor = self._out_of(result)
        return floats

    def _computed(self, named: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `repr` shows."""
        of = f"{str(self.weight.dtype).removeprefix('torch.')} weight {list(self.weight.shape)}"
        return f"{' + '.join([self.call.kind, *(post.kind for post in self.call.posts)])}, {of}"


class Int8WeightLinear(_InFloat):
    """`linear` of float32 over an `int8` weight, which is multiplied as it is: `x @ weight.T * weight_scale + bias`.

    `weight` is `int8 [out_features, in_features]`, symmetric per row with `weight_scale` (`float32 [out_features]`).
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: FloatCall) -> None:
        super().__init__(call, {})
        self._constants(weight, weight_scale, bias)

    def _computed(self, named: dict[str, Any]) -> Tensor:
        x, (outs, ins) = named["input"], self.weight.shape
        check_features(x, ins)
        if x.dtype is not torch.float32:
            raise RuntimeError(f"linear layer of int8 weights takes float32, not {x.dtype}")
        if not x.numel():
            return torch.empty((*x.shape[:-1], outs))
        flat = x.reshape(x.numel() // ins, ins).contiguous()
        result: Tensor = _int8_linear(flat, self.weight, self.weight_scale).view(*x.shape[:-1], outs)
        return result if self.bias is None else result.add_(self.bias)


class WeightOnly(_InFloat):
    """Any layer over integers, which are dequantized at each call: memory a quarter of the float weight's, no speed.

    `weight` has any shape; `weight_scale` and `weight_zero_point` are scalars or one per channel along the axis of
    the weight's spec. The weight that is computed with has the type `dtype`, as in the reference form, bit for bit.
    """

    weight_zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        qparams: QParams,
        call: FloatCall,
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(call, parameters)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", qparams.scale)
        self.register_buffer("weight_zero_point", qparams.zero_point)
        self._axis, self._dtype = qparams.spec.ch_axis, dtype

    def _computed(self, named: dict[str, Any]) -> Tensor:
        floats = dequantize(self.weight, self.weight_scale, self.weight_zero_point, ch_axis=self._axis)
        return computed(self.call.kind, {**named, "weight": floats.to(self._dtype)})


class CastWeight(_InFloat):
    """Any layer over a weight of a smaller float type, which is widened at each call: memory half of float32's."""

    def __init__(
        self, weight: Tensor, call: FloatCall, parameters: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(call, parameters)
        self.register_buffer("weight", weight)
        self._dtype = dtype

    def _computed(self, named: dict[str, Any]) -> Tensor:
        return computed(self.call.kind, {**named, "weight": self.weight.to(self._dtype)})


class OnednnLinearFloat16(_InFloat):
    """`linear` of float32 over a float16 weight, which oneDNN widens as it multiplies; sums are float32's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, call: FloatCall) -> None:
        super().__init__(call, {})
        assert weight.dtype is torch.float16 and weight.dim() == 2 and weight.numel(), f"{weight.dtype} {weight.shape}"
        assert bias is None or bias.dtype is torch.float32, f"bias is {bias.dtype}"
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def _computed(self, named: dict[str, Any]) -> Tensor:
        if torch.compiler.is_compiling():
            return self._uncompiled(named["input"])
        return self._product(named["input"])

    def _product(self, x: Tensor) -> Tensor:
        check_features(x, self.weight.shape[1])
        if not x.numel():
            return torch.empty((*x.shape[:-1], self.weight.shape[0]))
        packed = self._packs.get(0)
        if packed is None:
            packed = self._packed(0, lambda: _prepack_float16(self.weight, None))
        return _linear_float16(x.to(torch.float32), packed, self.bias)  # type: ignore[no-any-return]

    @outside_compile
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self._product(x)
