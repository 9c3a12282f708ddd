"""Swin: the plain model that STViT is compared with, on the same code."""

from __future__ import annotations

from collections.abc import Sequence

from stvit.models.hierarchy import HierarchicalTransformer, SwinStage, depth_rates, sizes_of
from stvit.models.stem import build_stem


class SwinTransformer(HierarchicalTransformer):
    """Swin Transformer for images of any size: classifier, or backbone of dense tasks.

    Args:
        img_size: height and width in pixels (or one number for both) that the model is made for.
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
        fixed_window: see `SwinBlock`; None: with `features_only`, as Swin's detection code does.
        mlp_ratio: hidden width of the MLPs in units of the channels.
        qkv_bias: bias in query, key and value projections.
        layer_scale: initial value of per-channel scales of residual branches; None for none.
        stem: `patch` (Swin's projection with a norm) or `conv` (3x3 convolutions of stride 2).
        drop_rate: dropout before the classifier, after attention projections and in MLPs.
        proj_drop_rate: of the latter two; None: `drop_rate`.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.
        features_only: return maps of the stages instead of logits, see `HierarchicalTransformer`.
        out_indices: stages whose maps are returned.
        frozen_stages: -1: none; 0: the stem; n: the first n stages as well.
        with_cp: recompute activations in the backward pass.

    Raises:
        ValueError: unknown option or impossible sizes.
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
        fixed_window: bool | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        stem: str = "patch",
        drop_rate: float = 0.0,
        proj_drop_rate: float | None = None,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
    ) -> None:
        embed_dim, depths, num_heads = sizes_of(arch, embed_dim, depths, num_heads)
        rates = depth_rates(drop_path_rate, depths)
        dims = [embed_dim << i for i in range(4)]
        stages = [
            SwinStage(
                dims[i],
                num_heads[i],
                rates[i],
                window=window_size,
                downsample=i > 0,
                fixed_window=features_only if fixed_window is None else fixed_window,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                layer_scale=layer_scale,
                attn_drop=attn_drop_rate,
                proj_drop=drop_rate if proj_drop_rate is None else proj_drop_rate,
                norm_eps=norm_eps,
            )
            for i in range(4)
        ]
        super().__init__(
            build_stem(stem, patch_size, in_chans, embed_dim, norm_eps=norm_eps, pad=True),
            stages,
            dims,
            [patch_size << i for i in range(4)],
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
