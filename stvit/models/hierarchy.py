"""What all models with Swin's four stages have in common: stem, stages, outputs, freezing, and timm's contract.

    image -> stem -> stages[0] -> ... -> stages[3] -> norm -> mean of the tokens -> classes     (classification)
                         |                    |
                     norms["0"]    ...    norms["3"]  -> one map per stage, (B, C_i, H_i, W_i)   (dense tasks)

A stage is a module `stage(x, hw) -> (x, hw)` on raster tokens; it begins with its patch merging.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, zeros_
from torch.utils.checkpoint import checkpoint

from core.layers.recorded import fixed
from stvit.models.classifier import TokenClassifier
from stvit.models.derived import constant
from stvit.models.merging import PatchMerging
from stvit.models.stem import ConvStem, PatchStem
from stvit.models.swin_block import SwinBlock

# Published sizes: channels of the first stage, layers and heads per stage.
ARCHS: dict[str, dict[str, object]] = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}

# Parts of a layer stack in the order in which tokens pass through them, for layer-wise learning rates.
_PARTS = ("downsample", "base", "generator", "semantic", "recovery", "blocks")


def sizes_of(
    arch: str,
    embed_dim: int | None,
    depths: Sequence[int] | None,
    num_heads: Sequence[int] | None,
    stages: int | None = 4,
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Channels of the first stage, depths and heads: what is given, and the rest from `arch`.

    `stages` is how many there have to be; None: any number.

    Raises:
        ValueError: unknown arch, a stage without layers or heads, or another number of stages.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: use one of {', '.join(ARCHS)}")
    given = dict(embed_dim=embed_dim, depths=depths, num_heads=num_heads)
    embed_dim, depths, num_heads = (ARCHS[arch] | {k: v for k, v in given.items() if v is not None}).values()
    sizes = f"depths={list(depths)} and num_heads={list(num_heads)}"
    if len(depths) != len(num_heads) or not depths or min(depths) < 1:
        raise ValueError(f"{sizes}: give each stage its layers (at least 1) and heads; there are four in arch={arch!r}")
    if stages is not None and len(depths) != stages:
        raise ValueError(f"{sizes}: the model has {stages} stages, give one number for each")
    return embed_dim, tuple(depths), tuple(num_heads)


def depth_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of every layer, by stage: rises linearly from 0 at the first layer to `rate` at the last."""
    total = sum(depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    return [rates[sum(depths[:i]) : sum(depths[: i + 1])] for i in range(len(depths))]


class SwinStage(nn.Module):
    """Patch merging (except in the first stage) and Swin layers, every second one shifted.

    Args:
        dim: channels C of the stage.
        num_heads: attention heads.
        drop_path: stochastic depth, one rate per layer.
        window: side of the windows.
        downsample: whether patch merging comes first.
        options: further arguments of every `SwinBlock`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: Sequence[float],
        *,
        window: int = 7,
        downsample: bool = True,
        norm_eps: float = 1e-5,
        **options: object,
    ) -> None:
        super().__init__()
        self.downsample = PatchMerging(dim // 2, norm_eps=norm_eps) if downsample else None
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                num_heads,
                window=window,
                shift=window // 2 if i % 2 else 0,
                drop_path=rate,
                norm_eps=norm_eps,
                **options,
            )
            for i, rate in enumerate(drop_path)
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Raster tokens `(B, H*W, C')` with `hw = (H, W)` to those of the stage and their raster."""
        x, hw = merge(self.downsample, x, hw)
        for block in self.blocks:
            x = call(block, x, hw, recompute=self.grad_checkpointing)
        return x, hw


def merge(downsample: PatchMerging | None, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Tokens and raster after the patch merging of a stage, if it has one."""
    return (x, hw) if downsample is None else (downsample(x, hw), ((hw[0] + 1) // 2, (hw[1] + 1) // 2))


def call(module: nn.Module, *inputs: object, recompute: bool) -> object:
    """`module(*inputs)`, its activations recomputed in the backward pass if asked for."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


class HierarchicalTransformer(TokenClassifier):
    """Stem, four stages, and either a classifier or normalised maps of the stages.

    Args:
        stem: image to token map.
        stages: modules `stage(x, hw) -> (x, hw)` with `downsample` and `grad_checkpointing`.
        dims: channels of every stage.
        reductions: image pixels per token side of every stage.
        img_size: height and width in pixels that the model is made for (others are accepted).
        num_classes: number of classes; 0 leaves out the classifier, and `forward` returns features.
        global_pool: what is classified: `avg`, `max`, `avgmax` of the tokens, or empty: every token by itself (with
            `num_classes=0`, `forward` returns tokens).
        ape: learned absolute positions, added to the tokens of the stem; on maps of another size they are resampled.
        features_only: `forward` returns a tuple of maps `(B, C_i, H_i, W_i)`, each through a norm of its own.
        out_indices: stages whose maps are returned.
        frozen_stages: -1: everything is trained; 0: the stem stays as it is; n: the first n stages as well. Frozen
            parts get no gradients and remain in evaluation mode.
        with_cp: recompute layers in the backward pass instead of keeping their activations.
        drop_rate: dropout before the classifier.
        norm_eps: epsilon of layer norms.

    Raises:
        ValueError: stages that do not exist.
    """

    def __init__(
        self,
        stem: PatchStem | ConvStem,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        reductions: Sequence[int],
        *,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 1000,
        global_pool: str = "avg",
        ape: bool = False,
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not set(out_indices) <= set(range(len(stages))) or not out_indices:
            raise ValueError(f"out_indices={tuple(out_indices)} must name some of the stages 0 to {len(stages) - 1}")
        if not -1 <= frozen_stages <= len(stages):
            raise ValueError(f"frozen_stages={frozen_stages} must lie between -1 (none) and {len(stages)} (all)")
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.num_classes = 0
        self.num_features = self.head_hidden_size = dims[-1]
        self.features_only = features_only
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.stem = stem
        self.in_chans = next(part.in_channels for part in stem.modules() if isinstance(part, nn.Conv2d))
        self.grid = stem.grid(*self.img_size)
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dims[0]))
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.stages = nn.ModuleList(stages)
        if features_only:
            self.norms = nn.ModuleDict({str(i): nn.LayerNorm(dims[i], eps=norm_eps) for i in self.out_indices})
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=norm_eps)
            self.build_classifier(dims[-1], num_classes, global_pool, drop_rate)
        self._init_layers()
        self.set_grad_checkpointing(with_cp)
        self._freeze()

    def _init_layers(self) -> None:
        """Linear layers: truncated normal of deviation .02, biases 0; learned tokens and tables have drawn theirs."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    zeros_(module.bias)

    # ------------------------------------------------------------------ forward

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits `(B, num_classes)` of images `(B, in_chans, H, W)`; with `features_only` one map per output stage."""
        if not self.features_only:
            return self.forward_head(self.forward_features(images))
        last = max(self.out_indices)
        maps = {i: self._map(x, hw, i) for i, x, hw in self._stages(images, last) if i in self.out_indices}
        return tuple(maps[i] for i in self.out_indices)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens of the last stage, `(B, N, C)`.

        Raises:
            RuntimeError: the model was built with `features_only=True`, which has no final norm.
        """
        self._needs_classifier("forward_features")
        return self.norm(self._after(images, len(self.stages) - 1)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The tokens `(B, N, C)` pooled, then the classifier unless `pre_logits`."""
        self._needs_classifier("forward_head")
        return super().forward_head(x, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, object]:
        """Maps of the stages on the way (timm's interface).

        Args:
            images: `(B, in_chans, H, W)`.
            indices: stages; a number takes the last ones, None all.
            norm: apply the norm that a map has (the final one, or those of `features_only`).
            stop_early: leave out stages after the last one asked for.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: return the maps alone.
            output_dict: return them by timm's names, `image_features` and `image_intermediates`.

        Returns:
            The maps, or the final tokens `(B, N, C)` (normalised where the last stage ran) and the maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: maps come as 'NCHW' or 'NHWC'")
        take = taken(indices, len(self.stages))
        last = max(take)
        maps: dict[int, Tensor] = {}
        for i, x, hw in self._stages(images, last if stop_early else len(self.stages) - 1):
            if i in take:
                maps[i] = self._map(x, hw, i, norm=norm, channels_last=output_fmt == "NHWC")
        intermediates = [maps[i] for i in take]
        if output_dict:
            named = {"image_intermediates": intermediates}
            return named if intermediates_only else named | {"image_features": self._norm_of(i)(x)}
        return intermediates if intermediates_only else (self._norm_of(i)(x), intermediates)

    def _stages(self, images: Tensor, last: int) -> Iterator[tuple[int, Tensor, tuple[int, int]]]:
        """Index, tokens and raster after every stage up to `last`."""
        tokens = self.stem(images)
        x, hw = rearrange(tokens, "b c h w -> b (h w) c"), fixed(tokens, 2, 3)
        if self.absolute_pos_embed is not None:
            position = self.absolute_pos_embed
            x = x + (position if hw == self.grid else constant(lambda: resize_position(position, self.grid, hw)))
        for i in range(last + 1):
            x, hw = self.stages[i](x, hw)
            yield i, x, hw

    def _after(self, images: Tensor, stage: int) -> tuple[Tensor, tuple[int, int]]:
        """Tokens and raster after one stage."""
        *_, (_, x, hw) = self._stages(images, stage)
        return x, hw

    def _map(
        self, x: Tensor, hw: tuple[int, int], index: int, *, norm: bool = True, channels_last: bool = False
    ) -> Tensor:
        x = self._norm_of(index)(x) if norm else x
        if channels_last:
            return rearrange(x, "b (h w) c -> b h w c", h=hw[0])
        return rearrange(x, "b (h w) c -> b c h w", h=hw[0]).contiguous()

    def _norm_of(self, index: int) -> nn.Module:
        if self.features_only:
            return self.norms[str(index)] if str(index) in self.norms else nn.Identity()
        return self.norm if index == len(self.stages) - 1 else nn.Identity()

    def _needs_classifier(self, name: str) -> None:
        if self.features_only:
            raise RuntimeError(f"{name} needs a classification model: this one has features_only=True, call it instead")

    # ------------------------------------------------------------------ freezing

    def train(self, mode: bool = True) -> HierarchicalTransformer:
        """Training or evaluation mode; frozen parts remain in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _freeze(self) -> None:
        for module in self._frozen():
            module.requires_grad_(False)
            module.eval()
        if self.absolute_pos_embed is not None and self.frozen_stages >= 1:
            self.absolute_pos_embed.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen = [self.stem, *self.stages[: self.frozen_stages]]
        if self.features_only:
            frozen += [self.norms[str(i)] for i in self.out_indices if i < self.frozen_stages]
        return frozen

    # ------------------------------------------------------------------ timm's contract

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps `indices` of `forward_intermediates` do not need.

        Args:
            indices: stages; a number takes the last ones.
            prune_norm: drop the final norm too (it goes with the last stage anyway).
            prune_head: drop the classifier.

        Returns:
            The stages kept, counted from the first.
        """
        self._needs_classifier("prune_intermediate_layers")
        take = taken(indices, len(self.stages))
        if prune_head:
            self.num_classes, self.head = 0, nn.Identity()
        if prune_norm or max(take) < len(self.stages) - 1:
            self.norm = nn.Identity()
        self.stages = self.stages[: max(take) + 1]
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, see `TokenClassifier.reset_classifier`."""
        self._needs_classifier("reset_classifier")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Make the model's own size another one: absolute positions are resampled once, instead of for every batch.

        Args:
            img_size: height and width in pixels, or one number for both; None: as it is.
            patch_size: what it is, or None.

        Raises:
            ValueError: another patch size, which would need another stem.
        """
        own = round(self.feature_info[0]["reduction"])
        if patch_size not in (None, own, (own, own)):
            raise ValueError(f"patch_size={patch_size}: the stem is made for {own} pixels")
        if img_size is None:
            return
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        old, self.grid = self.grid, self.stem.grid(*self.img_size)
        if (position := self.absolute_pos_embed) is not None:
            resized = resize_position(position.detach(), old, self.grid)
            self.absolute_pos_embed = nn.Parameter(resized, position.requires_grad)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that are not decayed: positions, learned and relative."""
        ends = ("relative_position_bias_table", ".position", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> object:
        """From a parameter's name to its place on the way from stem to head, for timm's layer-wise tools.

        One group per layer, or per stage if `coarse`.
        """
        return stage_of if coarse else layer_of

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable


def resize_position(position: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Absolute positions `(1, H*W, C)` of one `(height, width)` for another, bicubically (as Swin's authors do)."""
    if grid == to:
        return position
    maps = rearrange(position, "1 (h w) c -> 1 c h w", h=grid[0])
    maps = F.interpolate(maps.float(), size=to, mode="bicubic", align_corners=False)
    return rearrange(maps, "1 c h w -> 1 (h w) c").to(position.dtype)


def taken(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of `count` things are meant: None all, a number the last ones, a sequence those (negative from the end).

    Raises:
        ValueError: an index that does not exist.
    """
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        indices = range(count - last, count)
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(f"indices={indices!r} must name some of {count} intermediate results, 0 to {count - 1}")
    return [i % count for i in indices]


def stage_of(name: str) -> tuple[float, ...]:
    """Place of a parameter by its name: stem 0, stages 1 to 4, norms with the last stage, then the head."""
    return layer_of(name)[:2] if name.startswith("stages.") else layer_of(name)


def layer_of(name: str) -> tuple[float, ...]:
    """Place of a parameter by its name, in numbers that sort from stem to head."""
    if name.startswith(("stem.", "absolute_pos_embed")):
        return (0.0,)
    if match := re.match(r"norms?\.", name):
        # 99999 is timm's mark for "same group as the one before".
        return (float("inf"),) if match[0] == "norms." else (1.0, 99998.0, 99999.0)
    match = re.match(r"stages\.(\d+)\.(?:units\.(\d+)\.)?(\w+)(.*)", name)
    if match is None:
        return (float("inf"),)
    stage, unit, part, rest = match.groups()
    layer = re.search(r"\.(\d+)\.", rest) if part != "recovery" else None
    return (1.0, float(stage), float(unit or 0), float(_PARTS.index(part)), float(layer[1]) if layer else 0.0)
