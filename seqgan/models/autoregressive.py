"""The autoregressive transformer over codes: VQGAN's GPT, decoded with a key-value cache of fixed size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqgan.models.checks import check_codes, class_labels

CLASS_ROWS = ("own", "shared")


class KeyValueCache(NamedTuple):
    """Keys and values of all layers and positions, allocated once: `(L, B, heads, T, d)` each."""

    keys: Tensor
    values: Tensor


class CausalAttention(nn.Module):
    """Multi-head attention to the positions up to one's own."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """All positions `(B, T, C)` at once."""
        q, k, v = self._heads(x)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        return self.proj(rearrange(out, "b n t d -> b t (n d)"))

    def step(self, x: Tensor, position: int, keys: Tensor, values: Tensor) -> Tensor:
        """One position `(B, 1, C)`; its key and value are written into `(B, heads, T, d)` in place."""
        q, k, v = self._heads(x)
        keys[:, :, position] = k[:, :, 0]
        values[:, :, position] = v[:, :, 0]
        out = F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
        return self.proj(rearrange(out, "b n t d -> b t (n d)"))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(self.qkv(x), "b t (three n d) -> three b n t d", three=3, n=self.num_heads)


class GPTBlock(nn.Module):
    """Attention and MLP, each after its norm and beside a shortcut."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` in and out."""
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def step(self, x: Tensor, position: int, keys: Tensor, values: Tensor) -> Tensor:
        """One position `(B, 1, C)`, see `CausalAttention.step`."""
        x = x + self.attn.step(self.norm1(x), position, keys, values)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """Predicts every code from the class and the codes before it, in raster order (section 3.1).

    The sequence that is read is `[class, s_1 .. s_(N-1)]`, the one predicted `s_1 .. s_N`.

    Args:
        codebook_size: number of codes K.
        num_classes: with one class the model is unconditional, and the class is the token that starts a sequence.
        length: codes N of an image.
        dim: channels.
        depth: layers.
        num_heads: heads.
        dropout: of embeddings, attention and branches.
        class_rows: `own`: class c is token K + c; `shared`: class c reads the row of code c, as in published VQGAN
            models, and there are no further rows.
        null_class: one more row for "no class", which guidance needs; its label is `num_classes`.

    Raises:
        ValueError: the heads do not divide the channels; unknown `class_rows`; `shared` rows with `null_class`, or with
            more classes than codes.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        num_classes: int = 1000,
        length: int = 256,
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        dropout: float = 0.0,
        class_rows: str = "own",
        *,
        null_class: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads of equal size")
        if class_rows not in CLASS_ROWS:
            raise ValueError(f"unknown class_rows {class_rows!r}: use {', '.join(CLASS_ROWS)}")
        if class_rows == "shared" and (null_class or num_classes > codebook_size):
            raise ValueError("class_rows='shared' leaves no row for 'no class' and none beyond the codes: use own rows")
        self.codebook_size, self.num_classes, self.length = codebook_size, num_classes, length
        self.first_class = codebook_size if class_rows == "own" else 0
        self.null_label = num_classes if null_class else None
        self.num_heads = num_heads
        vocabulary = codebook_size + (num_classes + null_class if class_rows == "own" else 0)
        self.tokens = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.zeros(1, length, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(dim, num_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits `(B, N, K)` of codes `(B, N)`, each predicted from those before it and the class `label` `(B,)`.

        Raises:
            ValueError: codes outside of the codebook or more than there are positions; labels as of `start`.
        """
        check_codes(codes, self.codebook_size)
        tokens = torch.cat([self.start(label, codes.shape[0], codes.device)[:, None], codes[:, :-1]], dim=1)
        return F.linear(self.hidden(tokens), self.head.weight[: self.codebook_size])

    def start(self, label: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The token `(B,)` that a sequence starts with.

        Raises:
            ValueError: labels are missing although there are several classes, lie outside of them, or are not B.
        """
        return self.first_class + class_labels(label, self.num_classes, self.null_label, batch, device)

    def token_logits(self, tokens: Tensor) -> Tensor:
        """Logits `(B, T, V)` over the whole vocabulary after every token of `(B, T)`.

        Raises:
            ValueError: tokens outside of the vocabulary, or more than there are positions.
        """
        check_codes(tokens, self.tokens.num_embeddings)
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Features `(B, T, C)` of tokens `(B, T)`.

        Raises:
            ValueError: more tokens than positions.
        """
        count = tokens.shape[1]
        if count > self.length:
            raise ValueError(f"{count} tokens, but positions for {self.length}: build the model with a larger length")
        x = self.dropout(self.tokens(tokens) + self.positions[:, :count])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def allocate(self, batch: int) -> KeyValueCache:
        """An empty cache for `batch` sequences, on the model's device and in its precision."""
        dim = self.positions.shape[-1]
        shape = (len(self.blocks), batch, self.num_heads, self.length, dim // self.num_heads)
        return KeyValueCache(self.positions.new_empty(shape), self.positions.new_empty(shape))

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, cache: KeyValueCache) -> Tensor:
        """Logits `(B, V)` after the token `(B,)` at `position`; earlier ones have been given in earlier steps.

        Raises:
            ValueError: there is no such position.
        """
        if not 0 <= position < self.length:
            raise ValueError(f"position {position}: the model has 0 to {self.length - 1}")
        x = self.tokens(tokens)[:, None] + self.positions[:, position : position + 1]
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            x = block.step(x, position, keys, values)
        return self.head(self.norm(x))[:, 0]


def ar_base(codebook_size: int = 1024, num_classes: int = 1000, **options) -> ARTransformer:
    """24 layers of 768 channels: 173.4M parameters, 171.9M unconditional (`num_classes=1`)."""
    return ARTransformer(codebook_size, num_classes, **{"dim": 768, "depth": 24, "num_heads": 16, **options})


def ar_large(codebook_size: int = 1024, num_classes: int = 1000, **options) -> ARTransformer:
    """24 layers of 1024 channels: 306.7M parameters."""
    return ARTransformer(codebook_size, num_classes, **{"dim": 1024, "depth": 24, "num_heads": 16, **options})
