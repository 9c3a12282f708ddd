"""STViT-R-Swin: semantic tokens and their recovery in Swin's third stage (section 3.4 of the STViT paper).

    stages 1, 2, 4: Swin
    stage 3:        dumbbell units: a Swin layer, two generation layers, two layers on semantic tokens, one recovery

One class is the classifier and the backbone of dense tasks. The two released models read other keys in stage 3 although
they share their weights: `key_mode="concat"` is the classifier's way, `key_mode="window"` the detector's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stvit.models.dumbbell import SemanticLayers, SemanticStage, SemanticUnit, unit_layout
from stvit.models.hierarchy import HierarchicalTransformer, SwinStage, depth_rates, sizes_of
from stvit.models.merging import PatchMerging
from stvit.models.recovery import WindowTokenRecovery
from stvit.models.reducers.windowed import build_window_tokens
from stvit.models.stem import build_stem
from stvit.models.stvit_swin import per_layer
from stvit.models.swin_block import SwinBlock
from stvit.models.window_tokens import TokenGrid, check_mask_mode

# Side of the key windows: first generation layer, further ones, recovery (the last in semantic tokens); None: global.
KEY_WINDOWS: dict[str, tuple[int | None, int | None, int | None]] = {
    "concat": (10, None, None),
    "window": (14, 21, 27),
}


class STViTRSwin(HierarchicalTransformer):
    """Swin whose third stage works on semantic tokens and gives every image token back.

    The defaults are the released classification model of size S. `features_only=True` (with its default
    `key_mode="window"`) is the backbone for detection and segmentation.

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
        depths: layers of the four stages; the third is a multiple of the unit's `base_depth` + `stgm_depth` +
            `semantic_depth` + 1.
        num_heads: attention heads of the four stages.
        window_size: side of the windows in tokens.
        tokens: what image tokens are recovered from: `semantic`; or, for comparison, `pooled` or `random`, see
            `STViTSwin`.
        per_window: semantic tokens per window side.
        key_mode: `concat` or `window`, see `WindowTokenGenerator`; None: `window` with `features_only`.
        key_windows: sides of the key windows of the first generation layer, of further ones, and of recovery; None for
            all tokens. None altogether: what `key_mode` has, (10, None, None) or (14, 21, 27).
        mask_mode: treatment of padding with `key_mode="window"`: `exact` never reads it; `official` is what the
            released detection weights were trained with; `none` reads it all. None: `exact`, and `official` once
            `stvit.checkpoint.convert` has fitted those weights to the model.
        shortcut: residual of the first generation layer; None: with `key_mode="window"` only, as released.
        pool: initial centres of a window: `max`, `avg`, `weighted` or `weighted_offset`.
        use_global: learned global centres in the second generation layer of the first unit.
        global_in: `query`; `key`; or `both-units`, in the queries of every unit.
        use_conv_pos: position encoding of the centres by a convolution.
        relative_pos: relative positions in layers on semantic tokens.
        local_global: layers on semantic tokens: `alternate`, `local` or `global`.
        base_depth: Swin layers of a unit.
        stgm_depth: generation layers of a unit.
        semantic_depth: layers on semantic tokens of a unit.
        recover: `dumbbell`: every unit makes new tokens; `reuse`: later units update those of the first; `once`: no
            repeated units, tokens are recovered from once, at the end; `none`: never, the semantic map goes on.
        mlp_ratio: hidden width of the MLPs in units of the channels.
        qkv_bias: bias in query, key and value projections.
        layer_scale: initial value of per-channel scales in generation, semantic and recovery layers; None for none.
        layer_scale_swin: the same in Swin layers.
        stem: `conv` (3x3 convolutions of stride 2, as released) or `patch` (Swin's projection with a norm).
        drop_rate: dropout before the classifier, after attention projections and in MLPs.
        proj_drop_rate: of the latter two; None: `drop_rate`.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.
        features_only: return maps of the stages instead of logits, see `HierarchicalTransformer`.
        out_indices: stages whose maps are returned.
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
        arch: str = "small",
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window_size: int = 7,
        tokens: str = "semantic",
        per_window: int = 3,
        key_mode: str | None = None,
        key_windows: Sequence[int | None] | None = None,
        mask_mode: str | None = None,
        shortcut: bool | None = None,
        pool: str = "max",
        use_global: bool = False,
        global_in: str = "query",
        use_conv_pos: bool = False,
        relative_pos: bool = False,
        local_global: str = "alternate",
        base_depth: int = 1,
        stgm_depth: int = 2,
        semantic_depth: int = 2,
        recover: str = "dumbbell",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = 1e-5,
        layer_scale_swin: float | None = None,
        stem: str = "conv",
        drop_rate: float = 0.0,
        proj_drop_rate: float | None = None,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        attn_impl: str = "auto",
    ) -> None:
        embed_dim, depths, num_heads = sizes_of(arch, embed_dim, depths, num_heads)
        key_mode = ("window" if features_only else "concat") if key_mode is None else key_mode
        if key_mode not in KEY_WINDOWS:
            raise ValueError(f"unknown key_mode {key_mode!r}: use one of {', '.join(KEY_WINDOWS)}")
        first, further, recovered = KEY_WINDOWS[key_mode] if key_windows is None else key_windows
        given, mask_mode = mask_mode, check_mask_mode("exact" if mask_mode is None else mask_mode)
        mask_mode = "exact" if key_mode == "concat" else mask_mode
        layout = unit_layout(
            depths[2], recover, base_depth=base_depth, stgm_depth=stgm_depth, semantic_depth=semantic_depth
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
        swin = dict(window=window_size, fixed_window=key_mode == "window", layer_scale=layer_scale_swin, **layer)
        cross = dict(layer_scale=layer_scale, **layer)
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = TokenGrid(tuple(-(-side // (4 * patch_size)) for side in size), window_size, per_window)

        left = list(rates[2])
        units = []
        for index, number in enumerate(layout):
            base, generated, semantic, last = (
                [left.pop(0) for _ in range(number[kind])] for kind in ("base", "stgm", "semantic", "recovery")
            )
            units.append(
                SemanticUnit(
                    [SwinBlock(dims[2], num_heads[2], drop_path=rate, **swin) for rate in base],
                    build_window_tokens(
                        tokens,
                        dims[2],
                        num_heads[2],
                        generation=dict(
                            key_windows=per_layer((first, further), stgm_depth),
                            key_mode=key_mode,
                            mask_mode=mask_mode,
                            shortcut=key_mode == "window" if shortcut is None else shortcut,
                            use_conv_pos=use_conv_pos,
                            use_global=use_global and (index == 0 or global_in == "both-units"),
                            global_in=global_in,
                            global_grid=grid.size,
                            method=attn_impl,
                        ),
                        local_global=local_global,
                        window=window_size,
                        per_window=per_window,
                        # Where tokens are reused, units behind the first have nothing to pool.
                        pool=None if recover == "reuse" and index else pool,
                        drop_path=generated,
                        **cross,
                    ),
                    SemanticLayers(
                        dims[2],
                        num_heads[2],
                        semantic,
                        per_window=per_window,
                        local_global=local_global,
                        relative_grid=grid.size if relative_pos else None,
                        exact=mask_mode == "exact",
                        **cross,
                    ),
                    WindowTokenRecovery(
                        dims[2],
                        num_heads[2],
                        window=window_size,
                        per_window=per_window,
                        key_window=recovered,
                        mask_mode=mask_mode,
                        method=attn_impl,
                        drop_path=last[0],
                        **cross,
                    )
                    if last
                    else None,
                )
            )
        stages = [SwinStage(dims[i], num_heads[i], rates[i], downsample=i > 0, **swin) for i in (0, 1, 3)]
        stages.insert(2, SemanticStage(PatchMerging(dims[1], norm_eps=norm_eps), units, reuse=recover == "reuse"))
        coarser = 1 if recover != "none" else window_size / per_window
        super().__init__(
            build_stem(stem, patch_size, in_chans, embed_dim, norm_eps=norm_eps, pad=True),
            stages,
            dims,
            [patch_size, 2 * patch_size, 4 * patch_size * coarser, 8 * patch_size * coarser],
            img_size=img_size,
            num_classes=num_classes,
            global_pool=global_pool,
            ape=ape,
            features_only=features_only,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_rate=drop_rate,
            norm_eps=norm_eps,
        )
        self.per_window = per_window
        self.key_mode, self.mask_mode, self.mask_mode_given = key_mode, mask_mode, given is not None

    def set_mask_mode(self, mask_mode: str) -> None:
        """Changes the treatment of padding in all layers of a model with `key_mode="window"`.

        Raises:
            ValueError: unknown mode.
        """
        self.mask_mode = check_mask_mode(mask_mode)
        for unit in self.stages[2].units:
            if not unit.generator.concat:  # pooled and random tokens read no keys of windows
                unit.generator.mask_mode = mask_mode
            unit.semantic.exact = mask_mode == "exact"
            if unit.recovery is not None:
                unit.recovery.mask_mode = mask_mode

    def token_maps(self, images: Tensor, unit: int = -1) -> Tensor:
        """Where each semantic token of a unit looks: `(B, S, H', W')` on the raster of image tokens, sums to 1."""
        return self.stages[2].token_maps(*self._after(images, 1), unit)


def stvit_r_swin_tiny(**options: object) -> STViTRSwin:
    """STViT-R-Swin-T; `options` as in `STViTRSwin`."""
    return STViTRSwin(**(dict(arch="tiny") | options))


def stvit_r_swin_small(**options: object) -> STViTRSwin:
    """STViT-R-Swin-S; `options` as in `STViTRSwin`."""
    return STViTRSwin(**(dict(arch="small") | options))


def stvit_r_swin_base(**options: object) -> STViTRSwin:
    """STViT-R-Swin-B; `options` as in `STViTRSwin`."""
    return STViTRSwin(**(dict(arch="base") | options))
