"""Video Swin (Liu et al. 2022): Swin with patches and shifted windows in time as well; clips of any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_

from core.layers.recorded import fixed
from stvit.models.classifier import TokenClassifier
from stvit.models.clip_block import ClipBlock, half_shift
from stvit.models.clip_windows import Size, pad_clip
from stvit.models.hierarchy import call, depth_rates, sizes_of
from stvit.models.merging import PatchMerging
from stvit.models.windows import padded_size


class ClipPatches(nn.Module):
    """Disjoint patches over time and space, projected linearly and normalised.

    Args:
        patch_size: `(frames, rows, columns)` of a patch.
        in_chans: channels of a frame.
        dim: channels C of a token.
        norm: whether tokens are normalised.
        norm_eps: epsilon of that norm.
    """

    def __init__(self, patch_size: Size, in_chans: int, dim: int, *, norm: bool = True, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.proj = nn.Conv3d(in_chans, dim, self.patch_size, stride=self.patch_size)
        self.norm = nn.LayerNorm(dim, eps=norm_eps) if norm else nn.Identity()

    def forward(self, video: Tensor) -> Tensor:
        """`(B, in_chans, T, H, W)` to tokens `(B, T', H', W', C)`; zeros fill up the last patches."""
        video = rearrange(video, "b c t h w -> b t h w c")
        size = (padded_size(side, patch) for side, patch in zip(fixed(video, 1, 2, 3), self.patch_size, strict=True))
        video = rearrange(pad_clip(video, tuple(size)), "b t h w c -> b c t h w")
        return self.norm(rearrange(self.proj(video), "b c t h w -> b t h w c"))

    def grid(self, clip_size: Size) -> Size:
        """Token grid `(T', H', W')` of a clip of `(frames, rows, columns)`."""
        return tuple(-(-side // patch) for side, patch in zip(clip_size, self.patch_size, strict=True))


class ClipStage(nn.Module):
    """Patch merging in space (but for the first stage), then layers whose windows are shifted in every second.

    Args:
        dim: channels C of the stage.
        num_heads: attention heads.
        drop_path: one stochastic-depth rate per layer.
        downsample: whether tokens come in with C/2 channels and patch merging comes first.
        window: `(frames, rows, columns)` of a window.
        options: further arguments of every `ClipBlock`.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: Sequence[float], *, downsample: bool, window: Size, **options: object
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim // 2, norm_eps=options.get("norm_eps", 1e-5)) if downsample else None
        self.blocks = shifted_blocks(dim, num_heads, drop_path, window=window, **options)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Token clips `(B, T, H, W, C)`, or `(B, T, 2H, 2W, C/2)` with patch merging, to `(B, T, H, W, C)`."""
        x = merge_slices(self.downsample, x)
        for block in self.blocks:
            x = call(block, x, recompute=self.grad_checkpointing)
        return x


def shifted_blocks(
    dim: int, num_heads: int, drop_path: Sequence[float], *, window: Size, **options: object
) -> nn.ModuleList:
    """One `ClipBlock` per rate in `drop_path`; every second has its windows shifted by half."""
    shifts = ((0, 0, 0), half_shift(window))
    return nn.ModuleList(
        ClipBlock(dim, num_heads, window=window, shift=shifts[index % 2], drop_path=rate, **options)
        for index, rate in enumerate(drop_path)
    )


def merge_slices(downsample: PatchMerging | None, x: Tensor) -> Tensor:
    """Every slice of `(B, T, H, W, C)` through the patch merging of a stage: `(B, T, ceil(H/2), ceil(W/2), 2C)`.

    A stage that has none (None) takes `x` as it is.
    """
    if downsample is None:
        return x
    slices, height, width = fixed(x, 1, 2, 3)
    merged = downsample(rearrange(x, "b t h w c -> (b t) (h w) c"), (height, width))
    return rearrange(merged, "(b t) (h w) c -> b t h w c", t=slices, h=-(-height // 2))


class ClipClassifier(TokenClassifier):
    """Patches, stages, norm, mean, classifier: what models of clips have in common.

    Args:
        stages: from `(B, T, H, W, embed_dim)` on, one after the other; each has an attribute `grad_checkpointing`.
        clip_size: `(frames, rows, columns)` that the network is meant for; it takes any other, too.
        patch_size: `(frames, rows, columns)` of a patch.
        in_chans: channels of a frame.
        num_classes: classes; 0 leaves out the classifier.
        embed_dim: channels of the patches.
        num_features: channels that the stages end with.
        patch_norm: whether patches are normalised.
        head_drop: dropout before the classifier.
        norm_eps: epsilon of layer norms.
        init_std: deviation of linear layers at the start; None: `fan_in ** -0.5`, for few channels and short training.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        *,
        clip_size: Size,
        patch_size: Size,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        num_features: int,
        patch_norm: bool,
        head_drop: float,
        norm_eps: float,
        init_std: float | None,
    ) -> None:
        super().__init__()
        self.clip_size = check_size("clip_size", clip_size)
        self.init_std = init_std
        self.stem = ClipPatches(
            check_size("patch_size", patch_size), in_chans, embed_dim, norm=patch_norm, norm_eps=norm_eps
        )
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(num_features, eps=norm_eps)
        self.build_classifier(num_features, num_classes, "avg", head_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers: truncated normal of deviation `init_std`, biases 0; the rest as PyTorch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.init_std is not None:
                    trunc_normal_(module.weight, std=self.init_std)
                else:
                    std = module.in_features**-0.5
                    trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    zeros_(module.bias)

    def forward(self, video: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of clips `(B, in_chans, T, H, W)`."""
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """Normalised final tokens `(B, T', H', W', C)`."""
        x = self.stem(video)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The tokens `(B, T, H, W, C)` pooled, then the classifier unless `pre_logits`."""
        return super().forward_head(x.flatten(1, 3) if self.global_pool else x, pre_logits)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that are not decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


class VideoSwin(ClipClassifier):
    """Video Swin: clips to class scores.

    Args:
        clip_size: `(frames, rows, columns)` that the network is meant for; it takes any other, too.
        patch_size: `(frames, rows, columns)` of a patch.
        in_chans: channels of a frame.
        num_classes: classes; 0 leaves out the classifier.
        arch: `tiny`, `small` or `base` set those of the next three that are not given.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths: layers of each stage.
        num_heads: attention heads of each stage.
        window: `(frames, rows, columns)` of a window in tokens.
        mask_padding: see `ClipBlock`.
        mlp_ratio: hidden width of the MLPs in units of the channels.
        qkv_bias: bias in query, key and value projections.
        patch_norm: whether patches are normalised.
        head_drop: dropout before the classifier.
        proj_drop: dropout after attention projections and in MLPs.
        attn_drop: dropout on attention weights.
        drop_path_rate: stochastic depth of the last layer; rises linearly from 0 at the first.
        norm_eps: epsilon of layer norms.
        init_std: deviation of linear layers at the start, see `ClipClassifier`.

    Raises:
        ValueError: stages that do not belong together; a clip, patch or window without three positive sides.
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
        plan = stage_plan(embed_dim, depths, num_heads, drop_path_rate)
        block = dict(
            window=check_size("window", window),
            mask_padding=mask_padding,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
            norm_eps=norm_eps,
        )
        super().__init__(
            [ClipStage(*stage, downsample=index > 0, **block) for index, stage in enumerate(plan)],
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

    def token_grid(self, clip_size: Size | None = None) -> Size:
        """Slices, rows and columns of the tokens in the last stage but one, of a clip of `(frames, rows, columns)`."""
        return grid_after(self.stem.grid(clip_size or self.clip_size), len(self.stages) - 2)


def grid_after(grid: Size, mergings: int) -> Size:
    """A token grid after as many patch mergings."""
    frames, height, width = grid
    for _ in range(mergings):
        height, width = -(-height // 2), -(-width // 2)
    return frames, height, width


def stage_plan(
    embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], drop_path_rate: float
) -> list[tuple[int, int, list[float]]]:
    """`(channels, heads, stochastic-depth rate of every layer)` of each stage."""
    rates = depth_rates(drop_path_rate, depths)
    return [(embed_dim << index, heads, rates[index]) for index, heads in enumerate(num_heads)]


def check_size(name: str, sides: Sequence[int]) -> Size:
    """`sides` as a tuple.

    Raises:
        ValueError: not three positive numbers.
    """
    if len(sides) != 3 or any(side < 1 for side in sides):
        raise ValueError(f"{name}={list(sides)}: give three positive numbers (frames, rows, columns)")
    return tuple(sides)


def video_swin_tiny(**options: object) -> VideoSwin:
    """Video Swin-T; `options` as in `VideoSwin`."""
    return VideoSwin(**(dict(arch="tiny") | options))


def video_swin_small(**options: object) -> VideoSwin:
    """Video Swin-S; `options` as in `VideoSwin`."""
    return VideoSwin(**(dict(arch="small") | options))


def video_swin_base(**options: object) -> VideoSwin:
    """Video Swin-B; `options` as in `VideoSwin`."""
    return VideoSwin(**(dict(arch="base") | options))
