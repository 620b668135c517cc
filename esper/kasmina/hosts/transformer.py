"""The decoder: learned positions, pre-norm blocks of causal attention and a 4x MLP, output tied to the embedding.

Shape suffixes: B rows, T tokens, C width, H heads, V vocabulary. Source: Radford et al. 2019 (GPT-2).
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.hosts.base import DataShape, Host, KeyedDropout, SlotPlace
from esper.leyline.host_specs import TransformerHost

_INIT_SD = 0.02


class CausalAttention(nn.Module):
    """Every token attends to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the attended values, projected."""
        rows, tokens, width = x_BTC.shape
        query, key, value = (
            part.view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x_BTC).chunk(3, dim=-1)
        )
        out_BHTC = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=True)
        out: Tensor = self.project(out_BHTC.transpose(1, 2).reshape(rows, tokens, width))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then the same with the MLP; dropout on what is added."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = KeyedDropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the block's output."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        hidden = F.gelu(self.expand(self.mlp_norm(x_BTC)))
        return cast(Tensor, x_BTC + self.dropout(self.contract(hidden)))


class Embedding(nn.Module):
    """Token plus position, int64 [B, T] to float [B, T, C]; rows may be shorter than the context."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = KeyedDropout(dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the embedded tokens."""
        positions_TC = self.position.weight[: tokens_BT.shape[1]]
        return cast(Tensor, self.dropout(self.token(tokens_BT) + positions_TC))


class Decoder(Host):
    """Groups of blocks with a slot after each; the embedding belongs to the first group, which takes int64 [B, T]."""

    def __init__(self, spec: TransformerHost, shape: DataShape) -> None:
        super().__init__()
        width = spec.embed_width
        segments: list[nn.Module] = []
        for index in range(spec.slots):
            blocks = [Block(width, spec.heads, spec.dropout) for _ in range(spec.layers // spec.slots)]
            first = [Embedding(shape.num_classes, shape.resolution, width, spec.dropout)] if index == 0 else []
            segments.append(nn.Sequential(*first, *blocks))
        self.segments = nn.ModuleList(segments)
        self.norm = nn.LayerNorm(width)
        place = SlotPlace(channels=width, resolution=shape.resolution, kernel=0, pool=1, narrowed=0, frozen=False)
        self.places = (place,) * spec.slots
        self.depth = spec.layers + 1
        self._initialise(spec.layers)

    def _initialise(self, layers: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_SD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                # 2 x layers increments add up on the residual stream
                for last in (module.attention.project, module.contract):
                    nn.init.normal_(last.weight, std=_INIT_SD / math.sqrt(2 * layers))

    @property
    def embedding(self) -> Embedding:
        """The first module of the first segment; the head shares its token weights."""
        first = cast(nn.Sequential, self.segments[0])
        return cast(Embedding, first[0])

    def classify(self, h: Tensor) -> Tensor:
        """Return logits, float [B, T, V], from the last segment's output, float [B, T, C]."""
        return F.linear(self.norm(h), self.embedding.token.weight)
