"""STViT-Swin: Swin whose third stage goes over to semantic tokens (section 3.3 of the STViT paper).

Not released; rebuilt from the paper and its costs:

    stages 1, 2: Swin
    stage 3:     base Swin layers on image tokens -> generation -> local and global layers on semantic tokens
    stage 4:     the semantic map merged 2x2 -> global layers
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stvit.models.block import block_stack
from stvit.models.dumbbell import SemanticLayers, SemanticStage, SemanticUnit
from stvit.models.hierarchy import HierarchicalTransformer, SwinStage, call, depth_rates, merge, sizes_of
from stvit.models.merging import PatchMerging
from stvit.models.reducers.windowed import build_window_tokens
from stvit.models.stem import build_stem
from stvit.models.swin_block import SwinBlock
from stvit.models.window_tokens import TokenGrid


class GlobalStage(nn.Module):
    """Patch merging of the semantic map, then layers in which every token attends all.

    Args:
        dim: channels C of the stage.
        num_heads: attention heads.
        drop_path: stochastic depth, one rate per layer.
        options: further arguments of every `Block`.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: Sequence[float], *, norm_eps: float = 1e-5, **options: object
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim // 2, norm_eps=norm_eps)
        self.blocks = block_stack(dim, num_heads, drop_path, norm_eps=norm_eps, **options)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Raster tokens `(B, H*W, C/2)` with `hw = (H, W)` to `(B, ceil(H/2)*ceil(W/2), C)` and their raster."""
        x, hw = merge(self.downsample, x, hw)
        for block in self.blocks:
            x = call(block, x, recompute=self.grad_checkpointing)
        return x, hw


class STViTSwin(HierarchicalTransformer):
    """Swin with `per_window` x `per_window` semantic tokens in every window from the middle of its third stage on.

    Args:
        img_size: height and width in pixels (or one number for both) that the model is made for; images of any size
            are accepted.
        patch_size: side of a patch in pixels.
        in_chans: channels of the image.
        num_classes: number of classes; 0 leaves out the classifier.
        global_pool: what is classified, see `HierarchicalTransformer`; likewise `ape`, absolute positions.
        ape: whether there are any.
        arch: `tiny`, `small` or `base` set those of the next three that are not given.
        embed_dim: channels of the first stage; every further stage has twice as many.
        depths: layers of the four stages.
        num_heads: attention heads of the four stages.
        window_size: side of the windows in tokens.
        tokens: what the windows' tokens are: `semantic`; or, for comparison, `pooled` (centres without generation) or
            `random` (one random image token per cell). Methods that break the grid of windows are refused.
        per_window: semantic tokens per window side.
        base_depth: Swin layers of stage 3 before generation; None: half of the stage's layers after a third of it,
            that is 2 of 6 and 9 of 18.
        stgm_depth: generation layers.
        pool: initial centres of a window: `max`, `avg`, `weighted` or `weighted_offset`.
        key_windows: side of the window of image tokens that each generation layer reads, None for all of them; the
            last entry holds for further layers.
        shortcut: residual of the first generation layer.
        use_global: learned global centres in the second generation layer.
        global_in: `query` or `key`, see `WindowTokenGenerator`.
        use_conv_pos: position encoding of the centres by a convolution.
        learned_pos: learned position encoding of the centres.
        relative_pos: relative positions in layers on semantic tokens.
        local_global: layers on semantic tokens in stage 3: `alternate`, `local` or `global`.
        mlp_ratio: hidden width of the MLPs in units of the channels.
        qkv_bias: bias in query, key and value projections.
        layer_scale: initial value of per-channel scales in layers on semantic tokens; None for none.
        stem: `conv` (3x3 convolutions of stride 2, as in STViT-R) or `patch` (Swin's projection with a norm).
        drop_rate: dropout before the classifier, after attention projections and in MLPs.
        proj_drop_rate: of the latter two; None: `drop_rate`.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.
        frozen_stages: -1: none; 0: the stem; n: the first n stages as well.
        with_cp: recompute activations in the backward pass.
        attn_impl: how key windows are attended: `auto`, `gather`, `masked` or `per_window`, see `window_attention`.

    Raises:
        ValueError: unknown option or impossible depths.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        global_pool: str = "avg",
        ape: bool = False,
        arch: str = "tiny",
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window_size: int = 7,
        tokens: str = "semantic",
        per_window: int = 4,
        base_depth: int | None = None,
        stgm_depth: int = 2,
        pool: str = "max",
        key_windows: Sequence[int | None] = (10, 10),
        shortcut: bool = True,
        use_global: bool = False,
        global_in: str = "query",
        use_conv_pos: bool = False,
        learned_pos: bool = False,
        relative_pos: bool = False,
        local_global: str = "alternate",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        stem: str = "conv",
        drop_rate: float = 0.0,
        proj_drop_rate: float | None = None,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        frozen_stages: int = -1,
        with_cp: bool = False,
        attn_impl: str = "auto",
    ) -> None:
        embed_dim, depths, num_heads = sizes_of(arch, embed_dim, depths, num_heads)
        base_depth = default_base_depth(depths[2]) if base_depth is None else base_depth
        if base_depth < 0 or stgm_depth < 1 or base_depth + stgm_depth > depths[2]:
            raise ValueError(
                f"base_depth={base_depth} and stgm_depth={stgm_depth} do not fit into depths[2]={depths[2]} layers: "
                "they must be >= 0 and >= 1 and at most depths[2] together"
            )
        rates = depth_rates(drop_path_rate, depths)
        dims = [embed_dim << i for i in range(4)]
        layer = dict(
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate,
            proj_drop=drop_rate if proj_drop_rate is None else proj_drop_rate,
            norm_eps=norm_eps,
        )
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = TokenGrid(tuple(-(-side // (4 * patch_size)) for side in size), window_size, per_window)
        first = base_depth + stgm_depth
        unit = SemanticUnit(
            [
                SwinBlock(
                    dims[2],
                    num_heads[2],
                    window=window_size,
                    shift=window_size // 2 if i % 2 else 0,
                    drop_path=rate,
                    **layer,
                )
                for i, rate in enumerate(rates[2][:base_depth])
            ],
            build_window_tokens(
                tokens,
                dims[2],
                num_heads[2],
                generation=dict(
                    key_windows=per_layer(key_windows, stgm_depth),
                    key_mode="concat",
                    shortcut=shortcut,
                    use_conv_pos=use_conv_pos,
                    learned_pos=learned_pos,
                    use_global=use_global,
                    global_in=global_in,
                    global_grid=grid.size,
                    method=attn_impl,
                ),
                local_global=local_global,
                window=window_size,
                per_window=per_window,
                pool=pool,
                drop_path=rates[2][base_depth:first],
                layer_scale=layer_scale,
                **layer,
            ),
            SemanticLayers(
                dims[2],
                num_heads[2],
                rates[2][first:],
                per_window=per_window,
                local_global=local_global,
                relative_grid=grid.size if relative_pos else None,
                layer_scale=layer_scale,
                **layer,
            ),
        )
        stages = [
            *(
                SwinStage(dims[i], num_heads[i], rates[i], window=window_size, downsample=i > 0, **layer)
                for i in range(2)
            ),
            SemanticStage(PatchMerging(dims[1], norm_eps=norm_eps), [unit]),
            GlobalStage(dims[3], num_heads[3], rates[3], layer_scale=layer_scale, **layer),
        ]
        semantic = 4 * patch_size * window_size / per_window
        super().__init__(
            build_stem(stem, patch_size, in_chans, embed_dim, norm_eps=norm_eps, pad=True),
            stages,
            dims,
            [patch_size, 2 * patch_size, semantic, 2 * semantic],
            img_size=img_size,
            num_classes=num_classes,
            global_pool=global_pool,
            ape=ape,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_rate=drop_rate,
            norm_eps=norm_eps,
        )
        self.per_window = per_window

    def token_maps(self, images: Tensor) -> Tensor:
        """Where each semantic token looks: `(B, S, H', W')` on the raster of image tokens, every map sums to 1."""
        return self.stages[2].token_maps(*self._after(images, 1))


def default_base_depth(depth: int) -> int:
    """Swin layers of the third stage before generation: 2 of 6, 9 of 18 (they fit the paper's costs best)."""
    return 2 if depth <= 6 else depth // 2


def per_layer(values: Sequence[int | None], depth: int) -> tuple[int | None, ...]:
    """`depth` values: the given ones, the last of them repeated or the rest left out."""
    return (*values, *[values[-1]] * (depth - len(values)))[:depth]


def stvit_swin_tiny(**options: object) -> STViTSwin:
    """STViT-Swin-T; `options` as in `STViTSwin`."""
    return STViTSwin(**(dict(arch="tiny") | options))


def stvit_swin_small(**options: object) -> STViTSwin:
    """STViT-Swin-S; `options` as in `STViTSwin`."""
    return STViTSwin(**(dict(arch="small") | options))


def stvit_swin_base(**options: object) -> STViTSwin:
    """STViT-Swin-B; `options` as in `STViTSwin`."""
    return STViTSwin(**(dict(arch="base") | options))
