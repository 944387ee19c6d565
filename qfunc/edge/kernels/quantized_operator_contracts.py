"""The contracts of engine `"quantized"` for operators without quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels import quantized_operators as kernels
from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.quantized import TorchEngine, active_engine
from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.numerics.grid import Affine

_GIVEN, _OTHER = Affine(0.05, 77), Affine(0.037, 3)
_UNIT, _TWO_UNITS = Affine(1 / 256, 0), Affine(2 / 256, 128)

_Make = Callable[[Affine], Callable[..., Tensor]]
"""The kernel for the qparams of a result."""
_Shapes = tuple[tuple[int, ...], ...]

_ANY: _Shapes = ((3, 8), (2, 5, 33), (2, 8, 4, 6))
_IMAGES: _Shapes = ((2, 8, 4, 6), (1, 3, 5, 5))


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator of one value: its kernel, its meaning, and where its result's qparams come from."""

    name: str
    make: _Make
    meaning: Callable[[Tensor], Tensor]
    shapes: _Shapes = _ANY
    output: Affine | None = None
    """Qparams that the result always has; None for any."""
    engine_matters: bool = False
    """Whether torch has a kernel of its own while its qnnpack engine is active."""
    empty: bool = True

    def samples(self) -> Iterator[Sample]:
        """Inputs of all shapes, in all kinds of memory."""
        generator = torch.Generator().manual_seed(7)
        for shape in self.shapes:
            for label, codes in adversarial_codes(shape, generator):
                if self.empty or codes.numel():
                    output = self.output or output_for(self.meaning(real_values(codes, _GIVEN)))
                    yield Sample(f"{shape}, {label}", (codes,), None, output)

    def reference(self, sample: Sample) -> Tensor:
        """The float64 meaning."""
        return self.meaning(real_values(sample.tensors[0], _GIVEN))

    def contract(self, name: str, engine: TorchEngine) -> Contract:
        """The contract while an engine of torch's is active."""

        def kernel(sample: Sample) -> Tensor:
            assert sample.output is not None
            with active_engine(engine):
                result = self.make(sample.output)(as_quantized(sample.tensors[0], _GIVEN))
            found = (result.q_scale(), result.q_zero_point())
            if found != (sample.output.scale, sample.output.zero_point):
                raise RuntimeError(f"its result has scale {found[0]:g} and zero point {found[1]}")
            return result.int_repr()

        return Contract(name, kernel, self.reference, self.samples)


def _aten(function: Callable[[Tensor], Tensor]) -> _Make:
    return lambda _output: function


def _same(name: str, function: Callable[[Tensor], Tensor], shapes: _Shapes) -> _Operator:
    """An operator of aten's that hands the qparams of its input on."""
    return _Operator(name, _aten(function), function, shapes, _GIVEN, engine_matters=True)


_POOLED: dict[int, _Shapes] = {1: ((2, 8, 9),), 2: ((2, 8, 6, 7), (1, 3, 9, 5)), 3: ((2, 4, 5, 4, 6),)}


def _pools(rank: int) -> tuple[_Operator, ...]:
    largest, average = getattr(torch, f"max_pool{rank}d"), getattr(F, f"avg_pool{rank}d")
    adaptive, shapes = getattr(F, f"adaptive_avg_pool{rank}d"), _POOLED[rank]
    return (
        _same(f"max_pool{rank}d", lambda x: largest(x, 3, 2, 1, 1, True), shapes),
        _same(f"avg_pool{rank}d", lambda x: average(x, 3, 2, 1, False, False), shapes),
        _same(f"adaptive_avg_pool{rank}d", lambda x: adaptive(x, 2), shapes),
    )


def _resized(x: Tensor) -> Tensor:
    """In all the modes that are lowered, side by side."""
    modes = ("nearest", "nearest-exact", "bilinear", "area")
    return torch.cat([F.interpolate(x, size=(5, 4), mode=mode) for mode in modes], 1)


def _resized_codes(x: Tensor) -> Tensor:
    modes = ("nearest", "nearest-exact", "bilinear", "area")
    codes = torch.cat([F.interpolate(x, size=(5, 4), mode=mode).int_repr() for mode in modes], 1)
    return as_quantized(codes, _GIVEN)


_ACTIVATIONS = (
    _Operator("elu", lambda o: kernels.QuantizedELU(o, 1.3), lambda x: F.elu(x, 1.3), engine_matters=True),
    _Operator(
        "leaky_relu",
        lambda o: kernels.QuantizedLeakyReLU(o, 0.3),
        lambda x: F.leaky_relu(x, 0.3),
        engine_matters=True,
    ),
    _Operator("hardswish", kernels.QuantizedHardswish, F.hardswish, engine_matters=True),
    _Operator("sigmoid[any]", kernels.QuantizedSigmoid, torch.sigmoid),
    _Operator("sigmoid", _aten(torch.sigmoid), torch.sigmoid, output=_UNIT, engine_matters=True),
    _Operator("tanh", _aten(torch.tanh), torch.tanh, output=_TWO_UNITS, engine_matters=True),
    _Operator(
        "hardsigmoid",
        lambda _: kernels.QuantizedHardsigmoid(),
        F.hardsigmoid,
        output=_UNIT,
        engine_matters=True,
    ),
    _Operator("softmax", lambda o: kernels.QuantizedSoftmax(o, 1), lambda x: x.softmax(1)),
    _same("relu", torch.relu, _ANY),
    _same("clamp", lambda x: x.clamp(-1.01, 2.03), _ANY),
    _same("mean", lambda x: x.mean([-2, -1]), _IMAGES),
    *(pool for rank in (1, 2, 3) for pool in _pools(rank)),
    _Operator("interpolate", _aten(_resized_codes), _resized, _IMAGES, _GIVEN, engine_matters=True, empty=False),
    _Operator(
        "pad",
        lambda _: kernels.QuantizedPad((1, 2), "reflect"),
        lambda x: F.pad(x, (1, 2), "reflect"),
        ((2, 4, 5),),
        _GIVEN,
        empty=False,
    ),
)


def _norms() -> Iterator[_Operator]:
    generator = torch.Generator().manual_seed(8)
    weight, bias, mean = (torch.randn(8, generator=generator) for _ in range(3))
    var = torch.rand(8, generator=generator) + 0.1
    w, b, m, v = (value.double() for value in (weight, bias, mean, var))
    images: _Shapes = ((2, 8, 4, 6), (3, 8, 7), (2, 8, 2, 3, 4))
    for relu in (False, True):
        yield _Operator(
            f"batch_norm{'[relu]' * relu}",
            lambda o, relu=relu: kernels.QuantizedBatchNorm(mean, var, weight, bias, o, relu=relu),  # type: ignore[misc]
            lambda x, relu=relu: _relu(F.batch_norm(x, m, v, w, b), relu),  # type: ignore[misc]
            ((4, 8), *images),
        )
    yield _Operator(
        "layer_norm",
        lambda o: kernels.QuantizedLayerNorm((8,), weight, bias, o),
        lambda x: F.layer_norm(x, (8,), w, b),
        ((3, 8), (2, 5, 8)),
    )
    yield _Operator(
        "group_norm",
        lambda o: kernels.QuantizedGroupNorm(2, weight, bias, o),
        lambda x: F.group_norm(x, 2, w, b),
        images,
        empty=False,
    )
    yield _Operator(
        "instance_norm",
        lambda o: kernels.QuantizedInstanceNorm(weight, bias, o, 1e-5),
        lambda x: F.instance_norm(x, None, None, w, b),
        images,
        empty=False,
    )


def _relu(x: Tensor, relu: bool) -> Tensor:
    return x.relu() if relu else x


def _matmul() -> Contract:
    shapes = (((3, 8), (8, 5)), ((2, 4, 3, 8), (2, 4, 8, 5)), ((2, 3, 8), (8, 5)), ((8,), (8, 5)))

    def reference(sample: Sample) -> Tensor:
        return real_values(sample.tensors[0], _GIVEN) @ real_values(sample.tensors[1], _OTHER)

    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(9)
        for left, right in shapes:
            for label, x in islice(adversarial_codes(left, generator), 6):
                y = torch.randint(0, 256, right, dtype=torch.uint8, generator=generator)
                sample = Sample(f"{left} @ {right}, {label}", (x, y), None, None)
                yield Sample(sample.label, (x, y), None, output_for(reference(sample)))

    def kernel(sample: Sample) -> Tensor:
        assert sample.output is not None
        x, y = as_quantized(sample.tensors[0], _GIVEN), as_quantized(sample.tensors[1], _OTHER)
        return kernels.QuantizedMatmul(sample.output)(x, y).int_repr()  # type: ignore[no-any-return]

    return Contract("quantized.matmul", kernel, reference, samples)


def _stack() -> Contract:
    output = Affine(0.06, 100)

    def reference(sample: Sample) -> Tensor:
        return torch.stack([real_values(sample.tensors[0], _GIVEN), real_values(sample.tensors[1], _OTHER)], -1)

    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(10)
        for label, x in islice(adversarial_codes((2, 8, 3, 4), generator), 6):
            yield Sample(label, (x, x.flip(0)), None, output)

    def kernel(sample: Sample) -> Tensor:
        given = [as_quantized(sample.tensors[0], _GIVEN), as_quantized(sample.tensors[1], _OTHER)]
        return kernels.QuantizedStack(output, -1)(given).int_repr()  # type: ignore[no-any-return]

    return Contract("quantized.stack", kernel, reference, samples)


def operator_contracts(engines: tuple[TorchEngine, ...]) -> Iterator[Contract]:
    """The contracts for the torch engines of a host; where qnnpack has a kernel of its own, for that one, too."""
    if not engines:
        return
    usual = engines[0] if engines[0] != "qnnpack" or len(engines) == 1 else engines[1]
    for operator in (*_ACTIVATIONS, *_norms()):
        name = f"quantized.{operator.name}"
        yield operator.contract(name, usual)
        if operator.engine_matters and "qnnpack" in engines:
            yield operator.contract(f"{name}[qnnpack]", "qnnpack")
    yield _matmul()
    yield _stack()
