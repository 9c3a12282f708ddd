"""Video Swin with semantic tokens (section 4.4 of the STViT paper).

**A reconstruction.** The paper reports Kinetics-400 with Video Swin-T/S at 27 % fewer FLOPs and says that semantic
tokens are generated per frame; code and structure were not released. What is built here:

- stages 1 and 2 are Video Swin's;
- stage 3 (the last but one): `base_depth` layers of Video Swin, `len(key_windows)` generation layers, then layers on
  semantic tokens alone, alternating between the tokens of one window (8 x s x s) and those of 2x2 windows (8 x 2s x 2s,
  all tokens of a slice at 224x224);
- patch merging on the grid of semantic tokens, and stage 4 on windows of 8 x s x s.

As in Video Swin, every second layer has its windows shifted by half in time. s and the base depths are chosen among the
settings that fit the paper's image models, by multiply-accumulates at 32x224x224: s = 3 with base depths 3 (T) and 11
(S) gives -27.4 and -27.5 %; s = 4 with 2 and 9 gives -26.1 and -27.3 %.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stvit.models.clip_block import ClipBlock
from stvit.models.clip_tokens import ClipTokenGenerator
from stvit.models.clip_windows import Size
from stvit.models.hierarchy import call, sizes_of
from stvit.models.merging import PatchMerging
from stvit.models.video_swin import (
    ClipClassifier,
    ClipStage,
    check_size,
    grid_after,
    merge_slices,
    shifted_blocks,
    stage_plan,
)


class SemanticClipStage(nn.Module):
    """A stage of Video Swin that goes on with semantic tokens after its first layers.

    Args:
        dim: channels C of the stage.
        num_heads: attention heads.
        drop_path: one stochastic-depth rate per layer.
        downsample: see `ClipStage`.
        window: `(frames, rows, columns)` of a window; rows and columns are equal.
        base_depth: layers on image tokens.
        generator: arguments of `ClipTokenGenerator`.
        time_shift: whether every second layer on semantic tokens has its windows shifted in time.
        relative_pos: learned bias for relative positions of semantic tokens.
        layer_scale: initial value of the per-channel scales of generation and semantic layers; None for none.
        options: further arguments of every layer.

    Raises:
        ValueError: more base and generation layers than the stage has.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        *,
        downsample: bool,
        window: Size,
        base_depth: int,
        generator: dict[str, object],
        time_shift: bool,
        relative_pos: bool,
        layer_scale: float | None,
        mask_padding: bool,
        **options: object,
    ) -> None:
        super().__init__()
        generated = base_depth + len(generator["key_windows"])
        if base_depth < 0 or generated > len(drop_path):
            raise ValueError(
                f"base_depth={base_depth} and {generated - base_depth} generation layers do not fit into a stage of "
                f"{len(drop_path)} layers"
            )
        frames, side = window[0], generator["per_window"]
        self.downsample = PatchMerging(dim // 2, norm_eps=options["norm_eps"]) if downsample else None
        self.base = shifted_blocks(
            dim, num_heads, drop_path[:base_depth], window=window, mask_padding=mask_padding, **options
        )
        self.generator = ClipTokenGenerator(
            dim,
            num_heads,
            window=window[1],
            drop_path=drop_path[base_depth:generated],
            layer_scale=layer_scale,
            **generator,
            **options,
        )
        self.semantic = semantic_blocks(
            dim,
            num_heads,
            drop_path[generated:],
            windows=((frames, side, side), (frames, 2 * side, 2 * side)),
            time_shift=time_shift,
            relative_pos=relative_pos,
            layer_scale=layer_scale,
            **options,
        )
        self.grad_checkpointing = False

    def forward_base(self, x: Tensor) -> Tensor:
        """Image tokens `(B, T, H, W, C)` after the base layers."""
        x = merge_slices(self.downsample, x)
        for block in self.base:
            x = call(block, x, recompute=self.grad_checkpointing)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Token clips as in `ClipStage` to semantic tokens `(B, T, h, w, C)`."""
        x = call(self.generator, self.forward_base(x), recompute=self.grad_checkpointing)
        for block in self.semantic:
            x = call(block, x, recompute=self.grad_checkpointing)
        return x


class SemanticTailStage(nn.Module):
    """Patch merging on the grid of semantic tokens, then layers on them.

    Args:
        dim: channels C of the stage.
        num_heads: attention heads.
        drop_path: one stochastic-depth rate per layer.
        window: `(frames, s, s)`.
        options: see `semantic_blocks`.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: Sequence[float], *, window: Size, **options: object
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim // 2, norm_eps=options["norm_eps"])
        self.blocks = semantic_blocks(dim, num_heads, drop_path, windows=(window,), **options)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Semantic tokens `(B, T, h, w, C/2)` to `(B, T, ceil(h/2), ceil(w/2), C)`."""
        x = merge_slices(self.downsample, x)
        for block in self.blocks:
            x = call(block, x, recompute=self.grad_checkpointing)
        return x


def semantic_blocks(
    dim: int,
    num_heads: int,
    drop_path: Sequence[float],
    *,
    windows: Sequence[Size],
    time_shift: bool,
    **options: object,
) -> nn.ModuleList:
    """Layers on semantic tokens, one per rate in `drop_path`.

    They take the `windows` in turn; with `time_shift` every second is shifted in time by half a window. Space is not
    shifted: 2x2 windows together serve that purpose.
    """
    blocks = nn.ModuleList()
    for index, rate in enumerate(drop_path):
        window = windows[index % len(windows)]
        shift = (window[0] // 2 if time_shift and index % 2 else 0, 0, 0)
        blocks.append(ClipBlock(dim, num_heads, window=window, shift=shift, drop_path=rate, **options))
    return blocks


class STViTVideoSwin(ClipClassifier):
    """Video Swin whose stage 3 turns every 7x7 window of a slice into s x s semantic tokens.

    A reconstruction, see the module's docstring. At 32x224x224 stage 3 has 16 slices of 14x14 image tokens, then of
    2s x 2s semantic tokens, stage 4 of s x s.

    Args:
        clip_size: see `VideoSwin`, also for what is not named here.
        per_window: semantic tokens per window side, s.
        base_depth: layers of stage 3 (the last but one) on image tokens; None: 3 of up to 6 layers, else half of them
            and 2, that is 11 of 18.
        key_windows: side of the key windows of each generation layer in image tokens.
        key_frames: slices that queries and keys of generation layers share; None: the window's; 1: each slice alone.
        key_concat: whether semantic tokens are keys of the generation layers, too.
        pool: how centres are pooled: `max`, `avg`, `weighted` or `weighted_offset`.
        shortcut: whether the first generation layer keeps its residual, the pooled centres.
        time_shift: whether every second layer on semantic tokens has its windows shifted in time.
        semantic_relative_pos: learned bias for relative positions of semantic tokens.
        layer_scale: initial per-channel scale of residual branches of generation and semantic layers; None for none.

    Raises:
        ValueError: fewer than two stages, windows that are not square in space, or depths that do not fit.
    """

    def __init__(
        self,
        clip_size: Size = (32, 224, 224),
        patch_size: Size = (2, 4, 4),
        in_chans: int = 3,
        num_classes: int = 400,
        *,
        arch: str = "tiny",
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window: Size = (8, 7, 7),
        per_window: int = 3,
        base_depth: int | None = None,
        key_windows: Sequence[int] = (10, 14),
        key_frames: int | None = None,
        key_concat: bool = True,
        pool: str = "max",
        shortcut: bool = True,
        time_shift: bool = True,
        semantic_relative_pos: bool = False,
        layer_scale: float | None = None,
        mask_padding: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        init_std: float | None = 0.02,
    ) -> None:
        embed_dim, depths, num_heads = sizes_of(arch, embed_dim, depths, num_heads, stages=None)
        window = check_size("window", window)
        if len(depths) < 2:
            raise ValueError(f"depths={list(depths)}: semantic tokens take the place of the last two stages")
        if window[1] != window[2]:
            raise ValueError(f"window={list(window)}: semantic tokens need windows of as many rows as columns")
        plan = stage_plan(embed_dim, depths, num_heads, drop_path_rate)
        layer = dict(
            mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop, norm_eps=norm_eps
        )
        semantic = dict(time_shift=time_shift, relative_pos=semantic_relative_pos, layer_scale=layer_scale)
        generator = dict(
            per_window=per_window,
            frames=window[0] if key_frames is None else key_frames,
            key_windows=tuple(key_windows),
            concat=key_concat,
            pool=pool,
            shortcut=shortcut,
        )
        stages: list[nn.Module] = [
            ClipStage(*stage, downsample=index > 0, window=window, mask_padding=mask_padding, **layer)
            for index, stage in enumerate(plan[:-2])
        ]
        stages.append(
            SemanticClipStage(
                *plan[-2],
                downsample=len(plan) > 2,
                window=window,
                base_depth=default_base_depth(depths[-2]) if base_depth is None else base_depth,
                generator=generator,
                mask_padding=mask_padding,
                **semantic,
                **layer,
            )
        )
        stages.append(SemanticTailStage(*plan[-1], window=(window[0], per_window, per_window), **semantic, **layer))
        super().__init__(
            stages,
            clip_size=clip_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            num_features=plan[-1][0],
            patch_norm=patch_norm,
            head_drop=head_drop,
            norm_eps=norm_eps,
            init_std=init_std,
        )

    def token_maps(self, video: Tensor) -> Tensor:
        """Where each semantic token of a slice looks: `(B, T', S, H', W')` on the grid of stage 3, maps sum to 1."""
        x = self.stem(video)
        for stage in self.stages[:-2]:
            x = stage(x)
        stage = self.stages[-2]
        return stage.generator.token_maps(stage.forward_base(x))

    def token_grid(self, clip_size: Size | None = None) -> Size:
        """Slices, rows and columns of the semantic tokens of a clip of `(frames, rows, columns)`."""
        frames, *hw = grid_after(self.stem.grid(clip_size or self.clip_size), len(self.stages) - 2)
        return frames, *self.stages[-2].generator.token_grid(tuple(hw))


def default_base_depth(depth: int) -> int:
    """Layers of stage 3 on image tokens: 3 of 6, 11 of 18 (with 3x3 tokens per window they reach the paper's costs)."""
    return min(depth // 2, 3) if depth <= 6 else depth // 2 + 2


def stvit_video_swin_tiny(**options: object) -> STViTVideoSwin:
    """STViT-Video-Swin-T; `options` as in `STViTVideoSwin`."""
    return STViTVideoSwin(**(dict(arch="tiny") | options))


def stvit_video_swin_small(**options: object) -> STViTVideoSwin:
    """STViT-Video-Swin-S; `options` as in `STViTVideoSwin`."""
    return STViTVideoSwin(**(dict(arch="small") | options))


def stvit_video_swin_base(**options: object) -> STViTVideoSwin:
    """STViT-Video-Swin-B; `options` as in `STViTVideoSwin`."""
    return STViTVideoSwin(**(dict(arch="base") | options))
