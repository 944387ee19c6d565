"""Layers that train with rounded weights: torch's own, with the names and attributes that they have.

`norms` are, for each batch norm behind a layer, its gamma (or None) and its running variance. The weight is rounded as
it will be when they are folded into it, `w_q = round(w * f) / f` with `f = gamma / sqrt(var + eps)`: that is linear in
the layer's output channels, so that the layer gives what a layer of the folded weight gives, before the norm. The
reference rounds alike and divides the layer's output instead (Jacob et al. 2018, section 3.2; Krishnamoorthi 2018,
section 3.2.2), which takes several passes over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfunc.edge.checkpointed import computes_again
from qfunc.edge.switched import Switched
from qfunc.numerics.batch_norm import scaled_channels

Norms: TypeAlias = tuple[tuple[Tensor | None, Tensor], ...]
Deviations: TypeAlias = tuple[Tensor, ...]
Part: TypeAlias = Literal["rounded", "float", "error"]


@dataclass(frozen=True, slots=True)
class Fold:
    """How the norms behind a layer scale its weight: their `eps`, and where the output channels are."""

    eps: tuple[float, ...] = ()
    transpose: bool = False
    groups: int = 1

    def deviations(self, norms: Norms) -> Deviations:
        """What the norms divide by."""
        pairs = zip(norms, self.eps, strict=True)
        return tuple(torch.sqrt(_as_it_is(var) + eps) for (_, var), eps in pairs)

    def rounded(self, fake_quantize: nn.Module, weight: Tensor, norms: Norms, deviations: Deviations) -> Tensor:
        """The weight rounded for the norms; a channel that they make zero keeps its own."""
        if not norms:
            return fake_quantize(weight)  # type: ignore[no-any-return]
        factor = self._factor(norms, deviations)
        dead = factor == 0
        folded = fake_quantize(self._scaled(weight, factor))
        unfolded = self._scaled(folded, 1.0 / torch.where(dead, 1.0, factor))
        return unfolded + self._scaled(weight, dead.to(weight.dtype))

    def error(self, fake_quantize: nn.Module, weight: Tensor, norms: Norms, deviations: Deviations) -> Tensor:
        """What rounding adds to the weight that has the norms in it."""
        folded = self.folded(weight, norms, deviations)
        rounded: Tensor = fake_quantize(folded)
        return rounded - folded

    def folded(self, weight: Tensor, norms: Norms, deviations: Deviations) -> Tensor:
        """The weight with the norms in it."""
        return self._scaled(weight, self._factor(norms, deviations)) if norms else weight

    def _factor(self, norms: Norms, deviations: Deviations) -> Tensor:
        factors = [
            (1.0 if gamma is None else gamma) / deviation
            for (gamma, _), deviation in zip(norms, deviations, strict=True)
        ]
        whole = factors[0]
        for factor in factors[1:]:
            whole = whole * factor
        return whole

    def _scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        return scaled_channels(weight, factor, self.transpose, self.groups)


def _as_it_is(var: Tensor) -> Tensor:
    """A running variance that the norm is about to move.

    A compiler may compute what the way back needs from it anew, and would do so from what the norm has left. It
    computes only some operators anew, and `amin`, here of one value each, is not among them.
    """
    return var.unsqueeze(0).amin(0) if torch.compiler.is_compiling() else var


class _Folded(nn.Module):
    """What is rounded for norms: a part that is computed once more is rounded for those that there were before."""

    fold: Fold
    before: Deviations = ()

    def _deviations(self, norms: Norms) -> Deviations:
        if not norms or torch.compiler.is_compiling():
            return self.fold.deviations(norms)
        if not (computes_again() and self.before):
            self.before = self.fold.deviations(norms)
        return self.before


class QatLayer(_Folded):
    """What layers of rounded weights have in common: `weight_fake_quant`, and `bias_fake_quant` if that is rounded."""

    weight: Tensor
    bias: Any

    @classmethod
    def of(cls, layer: nn.Module, fake_quantizers: Mapping[str, nn.Module], fold: Fold) -> QatLayer:
        """The layer, with its own parameters and attributes, to train with fake quantizers; `layer` is used up."""
        made = cls.__new__(cls)
        vars(made).update(vars(layer))
        made.fold = fold
        for name, module in fake_quantizers.items():
            made.add_module(f"{name}_fake_quant", module)
        return made

    def _weight(self, norms: Norms = (), part: Part = "rounded") -> Tensor:
        fake_quantize = self._modules.get("weight_fake_quant")
        if fake_quantize is None or (part == "float" and self.training):
            return self.weight
        part = "rounded" if part == "float" else part
        made = self.fold.rounded if part == "rounded" else self.fold.error
        return made(fake_quantize, self.weight, norms, self._deviations(norms))

    def _bias(self, part: Part = "rounded") -> Tensor | None:
        """The bias; what an error is of has none."""
        if part == "error" or self.bias is None:
            return None
        fake_quantize = self._modules.get("bias_fake_quant")
        bias: Tensor = self.bias if fake_quantize is None else fake_quantize(self.bias)
        return bias

    def _has(self, part: Part) -> bool:
        """Whether there is a part: in evaluation the first run is rounded, and leaves no error."""
        return part != "error" or self.training


class _QatConv(QatLayer):
    def forward(self, input: Tensor, norms: Norms = (), part: Part = "rounded") -> Any:  # noqa: A002 - torch's name
        """The convolution, as torch computes it."""
        if not self._has(part):
            return None
        return self._conv_forward(input, self._weight(norms, part), self._bias(part))  # type: ignore[operator]


class QatConv1d(_QatConv, nn.Conv1d):
    """A convolution that trains with a rounded weight."""


class QatConv2d(_QatConv, nn.Conv2d):
    """A convolution that trains with a rounded weight."""


class QatConv3d(_QatConv, nn.Conv3d):
    """A convolution that trains with a rounded weight."""


class _QatConvTranspose(QatLayer):
    function: ClassVar[Any]

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        output_size: Any = None,
        norms: Norms = (),
        part: Part = "rounded",
    ) -> Any:
        if not self._has(part):
            return None
        layer: Any = self
        rank = len(layer.kernel_size)
        sizes = (layer.stride, layer.padding, layer.kernel_size, rank, layer.dilation)
        padding = layer._output_padding(input, output_size, *sizes)
        weight, bias = self._weight(norms, part), self._bias(part)
        return type(self).function(
            input, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )


class QatConvTranspose1d(_QatConvTranspose, nn.ConvTranspose1d):
    """A transposed convolution that trains with a rounded weight."""

    function = staticmethod(functional.conv_transpose1d)


class QatConvTranspose2d(_QatConvTranspose, nn.ConvTranspose2d):
    """A transposed convolution that trains with a rounded weight."""

    function = staticmethod(functional.conv_transpose2d)


class QatConvTranspose3d(_QatConvTranspose, nn.ConvTranspose3d):
    """A transposed convolution that trains with a rounded weight."""

    function = staticmethod(functional.conv_transpose3d)


class QatLinear(QatLayer, nn.Linear):
    """A linear layer that trains with a rounded weight."""

    def forward(self, input: Tensor, norms: Norms = (), part: Part = "rounded") -> Any:  # noqa: A002 - torch's name
        """The product, as torch computes it."""
        if not self._has(part):
            return None
        return functional.linear(input, self._weight(norms, part), self._bias(part))


class QatEmbedding(QatLayer, nn.Embedding):
    """A table of vectors that trains rounded."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """The rows, as torch looks them up."""
        given = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return functional.embedding(input, self._weight(), *given)


class QatEmbeddingBag(QatLayer, nn.EmbeddingBag):
    """A table of vectors, to be summed up, that trains rounded."""

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The sums of rows, as torch takes them."""
        return functional.embedding_bag(
            input,
            self._weight(),
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )


QAT_LAYERS: Mapping[type[nn.Module], type[QatLayer]] = MappingProxyType(
    {
        nn.Conv1d: QatConv1d,
        nn.Conv2d: QatConv2d,
        nn.Conv3d: QatConv3d,
        nn.ConvTranspose1d: QatConvTranspose1d,
        nn.ConvTranspose2d: QatConvTranspose2d,
        nn.ConvTranspose3d: QatConvTranspose3d,
        nn.Linear: QatLinear,
        nn.Embedding: QatEmbedding,
        nn.EmbeddingBag: QatEmbeddingBag,
    }
)
"""The layers that have such a form of their own; the parameters of any other are rounded where they are read."""


class RoundedParameter(_Folded):
    """Rounds a parameter that is not a layer's own, or that of a layer without a form for training."""

    def __init__(self, fake_quantize: nn.Module, fold: Fold) -> None:
        super().__init__()
        self.fake_quant, self.fold = fake_quantize, fold

    def forward(self, parameter: Tensor, norms: Norms = ()) -> Tensor:
        """The parameter, rounded."""
        return self.fold.rounded(self.fake_quant, parameter, norms, self._deviations(norms))


# Batch norms ----------------------------------------------------------------------------------------------------------


class QatBatchNorm(Switched):
    """What batch norms that train have in common: while `frozen`, they use their running statistics and keep them.

    `train()` leaves a frozen one in evaluation mode.
    """

    SWITCHES: ClassVar = (("frozen", False),)
    eps: float
    running_var: Tensor | None

    @classmethod
    def of(cls, norm: nn.Module) -> QatBatchNorm:
        """The norm, with its own parameters and statistics; `norm` is used up."""
        made = cls.__new__(cls)
        vars(made).update(vars(norm))
        made.add_switches()
        return made

    def train(self, mode: bool = True) -> Any:
        """Set the mode, but for a frozen norm, which stays in evaluation mode."""
        self.read_switches()
        return super().train(mode and not self.on["frozen"])

    def forward(self, input: Tensor, behind: Tensor | None = None, error: Tensor | None = None) -> Tensor:  # noqa: A002
        """The normed input; or, given that and the error of the folded weight, what the rounded weight would give.

        The statistics of the batch are those of `input`, and `behind` is what it became; `error` is in units of the
        running statistics.
        """
        if behind is None:
            again = computes_again() and self.training
            return self._again(input) if again else super().forward(input)
        if error is None:
            return behind
        if not self.training or self.running_var is None:
            return behind + error
        others = [axis for axis in range(input.dim()) if axis != 1]
        var = input.var(others, unbiased=False)
        ratio = torch.sqrt(self.running_var + self.eps) / torch.sqrt(var + self.eps)
        return behind + error * ratio.view(1, -1, *[1] * (input.dim() - 2))

    def _again(self, input: Tensor) -> Tensor:  # noqa: A002
        """What the norm gave on the way there; the statistics have moved already."""
        norm: Any = self
        mean, var = (None if held is None else held.clone() for held in (norm.running_mean, norm.running_var))
        made: Tensor = functional.batch_norm(input, mean, var, norm.weight, norm.bias, training=True, eps=self.eps)
        return made


class QatBatchNorm1d(QatBatchNorm, nn.BatchNorm1d):
    """A batch norm that can be frozen."""


class QatBatchNorm2d(QatBatchNorm, nn.BatchNorm2d):
    """A batch norm that can be frozen."""


class QatBatchNorm3d(QatBatchNorm, nn.BatchNorm3d):
    """A batch norm that can be frozen."""


QAT_NORMS: Mapping[type[nn.Module], type[QatBatchNorm]] = MappingProxyType(
    {nn.BatchNorm1d: QatBatchNorm1d, nn.BatchNorm2d: QatBatchNorm2d, nn.BatchNorm3d: QatBatchNorm3d}
)


class Mode(Switched):
    """Whether the model trains, for functional operators, which are told; for batch norms not while it is `frozen`."""

    SWITCHES: ClassVar = (("frozen", False),)

    def __init__(self, *, of_norms: bool) -> None:
        super().__init__()
        self.of_norms = of_norms
        self.add_switches()

    def forward(self) -> bool:
        """The mode."""
        return self.training and not (self.of_norms and self.on["frozen"])
