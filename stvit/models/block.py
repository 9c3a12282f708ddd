"""The transformer layer that every stage of STViT is made of: `Block(x, y=x)` (section 3.1 of the STViT paper)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from timm.layers import DropPath, LayerScale, Mlp, get_act_layer
from torch import Tensor, nn

from stvit.models.attention import Attention
from stvit.models.windows import merge_windows, split_windows


class Block(nn.Module):
    """Pre-norm layer whose keys may be other tokens than its queries.

    `x <- x + DropPath(ls1 * Attention(LN1 x, LN1 y))`, then `x <- x + DropPath(ls2 * MLP(LN2 x))`. One LN1 serves
    queries and keys, so that a layer can be used for self-attention (y = x), generation and recovery alike.

    Args:
        dim: channels C.
        num_heads: attention heads.
        mlp_ratio: width of the MLP's hidden layer in units of C.
        qkv_bias: bias in the query and key/value projections.
        layer_scale: initial value of the per-channel scales `ls1`, `ls2`; None leaves them out.
        drop_path: probability of dropping each residual branch, per sample, while training.
        attn_drop: dropout on attention weights.
        proj_drop: dropout after the attention projection and inside the MLP.
        norm_eps: epsilon of both layer norms (1e-6 in DeiT variants, 1e-5 in Swin variants).
        window: side of the square windows that self-attention is confined to; None attends globally.
        relative_window: side of the grid whose relative positions are learned, see `Attention`.
        act_layer: activation of the MLP, see `activation`.
        residual_scale: factor of both residual branches, as LV-ViT has one; not with `layer_scale`.
        shortcut: False drops the residual (and the stochastic depth) of the attention half, as the released
            classification models do in their first generation layer.

    Raises:
        ValueError: both kinds of scales.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
        window: int | None = None,
        relative_window: int | tuple[int, int] | None = None,
        act_layer: str | Callable[[], nn.Module] = "gelu",
        residual_scale: float = 1.0,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        if layer_scale is not None and residual_scale != 1:
            raise ValueError(f"residual_scale={residual_scale} and layer_scale={layer_scale} are one or the other")
        self.window = window
        self.shortcut = shortcut
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            relative_window=relative_window,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.ls1 = branch_scale(dim, layer_scale, residual_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=activation(act_layer), drop=proj_drop)
        self.ls2 = branch_scale(dim, layer_scale, residual_scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        y: Tensor | Sequence[Tensor] | None = None,
        *,
        grid: tuple[int, int] | None = None,
        mask: Tensor | None = None,
        between: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Update tokens `x` `(B, N, C)`.

        Args:
            x: queries and residual.
            y: tokens that are attended, `(B, M, C)` or several such tensors that count as one sequence; None: `x`.
            grid: `(height, width)` of the raster that `x` lies on; needed by windowed layers, and by global ones whose
                relative positions were learned on another raster.
            mask: as in `Attention.forward`; for windowed layers broadcastable to `(B*windows, heads, n, n)`.
            between: `(x, q, k) -> x`, called between the attention half and the MLP with this layer's projected queries
                `(B, heads, N, d)` and keys; what it returns may have fewer tokens.
            choose: `(x, q, k, v) -> (B, K)`, called before the attention: places of the tokens that go on. The rest is
                attended, and asks nothing.

        Raises:
            ValueError: a windowed layer got no grid, a grid that windows do not tile, other keys than `x`, a `between`
                or a `choose`.
        """
        if between is None and choose is None:
            update = self.ls1(self._attention(x, y, grid, mask))
            return self._feed_forward(self._attended(x, update))
        if self.window is not None:
            raise ValueError("a windowed Block has no queries and keys of the whole map to hand to between= or choose=")
        q, k, v = self._project(x, y)
        if choose is not None:
            places = choose(x, q, k, v)
            x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
            q = q.gather(2, places[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1]))
        update = self.ls1(self.attn.attend(q, k, v, mask=mask))
        x = self._attended(x, update)
        return self._feed_forward(x if between is None else between(x, q, k))

    def attention_weights(self, x: Tensor, y: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Attention probabilities `(B, heads, N, M)` of a global layer, float32; `y` and `mask` as in `forward`."""
        q, k, _ = self._project(x, y)
        return self.attn.weights(q, k, mask)

    def _attention(
        self, x: Tensor, y: Tensor | Sequence[Tensor] | None, grid: tuple[int, int] | None, mask: Tensor | None
    ) -> Tensor:
        if self.window is None:
            return self.attn.attend(*self._project(x, y), mask=mask, grid=grid)
        if y is not None or grid is None:
            raise ValueError("a windowed Block does self-attention only: pass grid=(height, width) and no y")
        windows = split_windows(self.norm1(x), grid, self.window)
        return merge_windows(self.attn(windows, mask=mask), grid, self.window)

    def _project(self, x: Tensor, y: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.norm1(x)
        if y is None:
            sources = [normed]
        else:
            sources = [self.norm1(source) for source in ([y] if isinstance(y, Tensor) else y)]
        return self.attn.queries(normed), *self.attn.keys_values(*sources)

    def _attended(self, x: Tensor, update: Tensor) -> Tensor:
        return x + self.drop_path(update) if self.shortcut else update

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def activation(kind: str | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The class of an activation: `gelu` (exact), timm's name of another (`gelu_tanh`, `quick_gelu`), or itself.

    Raises:
        ValueError: unknown name.
    """
    if not isinstance(kind, str):
        return kind
    try:
        return nn.GELU if kind == "gelu" else get_act_layer(kind)
    except KeyError:
        raise ValueError(f"unknown act_layer {kind!r}: use timm's names, such as gelu, gelu_tanh, quick_gelu") from None


class Scale(nn.Module):
    """Multiplies by a constant.

    Args:
        factor: the constant.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """`x * factor`, of any shape."""
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


def branch_scale(dim: int, layer_scale: float | None, residual_scale: float) -> nn.Module:
    """What a residual branch of `dim` channels is multiplied by: learned scales, a constant, or nothing."""
    if layer_scale is not None:
        return LayerScale(dim, layer_scale)
    return nn.Identity() if residual_scale == 1 else Scale(residual_scale)


def set_shortcut(layer: Block, shortcut: bool) -> None:
    """Says whether a generation layer keeps its residual; warns where its tokens would be next to nothing without.

    With layer scales of 1e-5, tokens without residual are so small at first that the epsilon of the norms behind them
    outweighs their variance, and the branch wakes up slowly. So it was released, and trained weights are not concerned.
    """
    layer.shortcut = shortcut
    scale = layer.ls1.init_values if isinstance(layer.ls1, LayerScale) else None
    if shortcut or scale is None or scale >= layer.norm1.eps**0.5 or layer.norm1.weight.is_meta:
        return
    warnings.warn(
        f"shortcut=False with layer_scale={scale:g}: semantic tokens start at almost zero and learn slowly; training "
        "from noise does better with shortcut=True or a larger layer_scale",
        stacklevel=3,
    )


def block_stack(dim: int, num_heads: int, drop_path: Sequence[float], **options: object) -> nn.ModuleList:
    """One `Block` for every stochastic-depth rate in `drop_path`; `options` go to each."""
    return nn.ModuleList(Block(dim, num_heads, drop_path=rate, **options) for rate in drop_path)
