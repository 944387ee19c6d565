"""A plain post-norm BERT encoder (Devlin et al. 2018), as model zoos write it, with the weights of a trained one.

What quantizes badly in trained ones is there: attention that is far from uniform, a few outlier channels that the norms
scale up, and a mask that adds -10,000.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

VOCABULARY, POSITIONS, TYPES = 120, 40, 2
WIDTH, HEADS, INNER, LAYERS = 64, 4, 256, 2
OUTLIERS = ((7, 9.0), (41, -6.0))
"""Channels, and how much more the norms scale them."""


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position_embeddings = nn.Embedding(POSITIONS, WIDTH)
        self.token_type_embeddings = nn.Embedding(TYPES, WIDTH)
        self.LayerNorm, self.dropout = nn.LayerNorm(WIDTH, eps=1e-12), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(POSITIONS).expand((1, -1)))

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        positions = self.position_embeddings(self.position_ids[:, : ids.size(1)])
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings(types) + positions))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(x.size()[:-1] + (HEADS, WIDTH // HEADS)).permute(0, 2, 1, 3)  # noqa: RUF005 - as it is written

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self._by_head(self.query(x)), self._by_head(self.key(x)), self._by_head(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        weights = self.dropout(F.softmax(scores + mask, dim=-1))
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous()
        return context.view(context.size()[:-2] + (WIDTH,))  # noqa: RUF005


class Output(nn.Module):
    """Dense, dropout, and the norm of the sum with what came in."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(inputs, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_output = SelfAttention(), Output(WIDTH)
        self.intermediate, self.output = nn.Linear(WIDTH, INNER), Output(INNER)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_output(self.attention(x, mask), x)
        return self.output(F.gelu(self.intermediate(x)), x)


class Bert(nn.Module):
    """Gives the last hidden state, the pooled first token, and scores of words by the weight of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layer = Embeddings(), nn.ModuleList(Layer() for _ in range(LAYERS))
        self.pooler, self.decoder = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.embeddings.word_embeddings.weight

    def forward(self, ids: Tensor, attention_mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -10000.0
        x = self.embeddings(ids, types)
        for layer in self.layer:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0])), self.decoder(x)


def bert(seed: int = 0) -> Bert:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Bert().eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                sharp = 2.5 if name.endswith(("query", "key")) else 1.0
                module.weight.normal_(std=sharp * 0.02 * math.sqrt(768 / WIDTH))
            if isinstance(module, nn.Linear):
                module.bias.normal_(std=0.05)
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.6, 1.0)
                module.bias.normal_(std=0.05)
                for channel, scale in OUTLIERS:
                    module.weight[channel] *= scale
        return model


def batch(size: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, a mask that is 0 behind the end of each text, and token types."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    ends = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < ends).long()
    return ids * mask, mask, (torch.arange(length) >= ends // 2).long() * mask
