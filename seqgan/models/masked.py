"""The masked transformer over codes: MaskGIT's bidirectional encoder in the manner of BERT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqgan.models.checks import check_codes, check_mask, class_labels

_EPS = 1e-12


class PostNormAttention(nn.Module):
    """Multi-head attention among all positions; the norm follows the sum."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` in and out."""
        q, k, v = rearrange(self.qkv(x), "b t (three n d) -> three b n t d", three=3, n=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training)
        out = self.proj(rearrange(out, "b n t d -> b t (n d)"))
        return self.norm(x + F.dropout(out, self.dropout, self.training))


class PostNormMLP(nn.Module):
    """Two linear layers with GELU (tanh form) between; the norm follows the sum."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` in and out."""
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x), approximate="tanh"))))


class MaskedTransformer(nn.Module):
    """Predicts masked codes from all others and the class (section 3.1).

    The vocabulary is K codes, then the classes, then the mask. "No class", which guidance needs, is the mask in place
    of the class, so it takes no further row.

    Args:
        codebook_size: number of codes K.
        num_classes: with one class the model is unconditional.
        length: codes N of an image.
        dim: channels.
        depth: layers.
        num_heads: heads.
        mlp_dim: width of the MLPs; None: 4 dim.
        dropout: of embeddings, attention and branches.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        num_classes: int = 1000,
        length: int = 256,
        dim: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        mlp_dim: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be split into {num_heads} heads of equal size")
        self.codebook_size, self.num_classes, self.length = codebook_size, num_classes, length
        self.null_label = num_classes
        self.mask_token = codebook_size + num_classes
        self.tokens = nn.Embedding(codebook_size + num_classes + 1, dim)
        self.positions = nn.Embedding(length + 1, dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            attention = PostNormAttention(dim, num_heads, dropout)
            self.blocks.append(nn.Sequential(attention, PostNormMLP(dim, mlp_dim or 4 * dim, dropout)))
        self.head = nn.Linear(dim, dim)
        self.head_norm = nn.LayerNorm(dim, eps=_EPS)
        self.head_bias = nn.Parameter(torch.zeros(codebook_size + num_classes + 1))
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, codes: Tensor, mask: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits over codes at every position.

        Args:
            codes: `(B, N)`; what stands at masked positions is not read.
            mask: `(B, N)`, True where the code is hidden.
            label: `(B,)`; `num_classes` stands for "no class".

        Returns:
            `(B, N, K)`.

        Raises:
            ValueError: labels are missing although there are several classes, lie outside of them, or are not B; codes
                that are read lie outside of the codebook, or are more than there are positions; a mask of another
                shape.
        """
        check_mask(mask, codes)
        check_codes(codes, self.codebook_size, read=~mask)
        label = class_labels(label, self.num_classes, self.null_label, codes.shape[0], codes.device)
        hidden = torch.where(mask, self.mask_token, codes)
        tokens = torch.cat([(self.codebook_size + label)[:, None], hidden], dim=1)
        return self._predict(self.hidden(tokens)[:, 1:], self.codebook_size)

    def token_logits(self, tokens: Tensor) -> Tensor:
        """Logits `(B, T, V)` over the whole vocabulary for tokens `(B, T)`.

        Raises:
            ValueError: tokens outside of the vocabulary, or more than there are positions.
        """
        check_codes(tokens, self.tokens.num_embeddings)
        return self._predict(self.hidden(tokens), len(self.head_bias))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Features `(B, T, C)` of tokens `(B, T)`.

        Raises:
            ValueError: more tokens than positions.
        """
        count = tokens.shape[1]
        if count > self.length + 1:
            raise ValueError(f"{count} tokens, but positions for {self.length + 1}: build the model with that length")
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions.weight[:count]))
        for block in self.blocks:
            x = block(x)
        return x

    def _predict(self, x: Tensor, rows: int) -> Tensor:
        """Logits of the first `rows` of the vocabulary, whose table is that of the embeddings."""
        x = self.head_norm(F.gelu(self.head(x), approximate="tanh"))
        return F.linear(x, self.tokens.weight[:rows], self.head_bias[:rows])


def nar_base(codebook_size: int = 1024, num_classes: int = 1000, **options) -> MaskedTransformer:
    """24 layers of 768 channels: 172.5M parameters, 171.7M unconditional (`num_classes=1`)."""
    return MaskedTransformer(codebook_size, num_classes, **{"dim": 768, "depth": 24, "num_heads": 16, **options})


def nar_large(codebook_size: int = 1024, num_classes: int = 1000, **options) -> MaskedTransformer:
    """24 layers of 1024 channels: 305.7M parameters."""
    return MaskedTransformer(codebook_size, num_classes, **{"dim": 1024, "depth": 24, "num_heads": 16, **options})
