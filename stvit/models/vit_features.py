"""What timm's tools ask of a ViT besides its logits: tokens after layers on the way, parameter groups, other sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from stvit.models.classifier import TokenClassifier
from stvit.models.controls import AllTokens
from stvit.models.hierarchy import taken
from stvit.models.tokens import SemanticTokenGenerator


class ViTFeatures(TokenClassifier):
    """The parts of timm's `VisionTransformer` interface that do not make the logits, for `SemanticTokenViT`."""

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]] | dict[str, Any]:
        """Tokens after layers on the way, as maps (timm's interface).

        Image tokens lie on the grid of patches, semantic tokens on theirs, so maps change size at the first generation
        layer.

        Args:
            images: `(B, in_chans, H, W)`.
            indices: layers, generation and tail layers counted on from the base layers; a number takes the last ones,
                None all.
            return_prefix_tokens: return pairs of a map and the tokens in front of it `(B, prefix, C)`.
            norm: apply the final norm to each.
            stop_early: leave out layers after the last one asked for.
            output_fmt: `NCHW` (maps) or `NLC` (tokens in raster order).
            intermediates_only: return them alone.
            output_dict: return them by timm's names, `image_features` and `image_intermediates` (`..._prefix`).

        Returns:
            The maps, or the final tokens `(B, S, C)` (normalised) and the maps.

        Raises:
            ValueError: another format; or a method whose tokens lie on no grid.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: maps come as 'NCHW', tokens as 'NLC'")
        self._needs_grid("maps on the way exist")
        take = taken(indices, len(self.feature_info))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (x, grid) in enumerate(self._steps(images)):
            if index in take:
                tokens = self.norm(x) if norm else x
                first = tokens.shape[1] - grid[0] * grid[1]
                prefix, tokens = tokens[:, :first], tokens[:, first:]
                if output_fmt == "NCHW":
                    tokens = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0]).contiguous()
                found[index] = (tokens, prefix)
            if stop_early and index == max(take):
                break
        maps, prefixes = ([found[index][part] for index in take] for part in (0, 1))
        if output_dict:
            named = {"image_intermediates": maps}
            named |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            return named if intermediates_only else named | {"image_features": self.norm(x)}
        intermediates = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Tokens `(B, N, C)` of the last `n` layers, or of those named; with `reshape` maps. DINO's interface."""
        return self.forward_intermediates(
            images,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the tokens `indices` of `forward_intermediates` do not need.

        Args:
            indices: layers; a number takes the last ones.
            prune_norm: drop the final norm too.
            prune_head: drop pooling and classifier.

        Returns:
            The layers meant, counted from the first.
        """
        self._needs_grid("layers can be left out")
        take = taken(indices, len(self.feature_info))
        kept = max(take) + 1
        base, generated = len(self.base), len(self.reducer.layers)
        self.base, self.tail = self.base[:kept], self.tail[: max(kept - base - generated, 0)]
        if kept <= base:
            self.reducer = AllTokens(self.embed_dim, 1, depth=0)
        else:
            self.reducer.layers = self.reducer.layers[: kept - base]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    @property
    def feature_info(self) -> list[dict[str, object]]:
        """Channels, pixels per token side and module of what `forward_intermediates` gives, by layer."""
        patch = self.img_size[0] / self.grid[0]
        semantic = self.img_size[0] / self.token_grid[0] if isinstance(self.reducer, SemanticTokenGenerator) else patch
        places = [f"base.{i}" for i in range(len(self.base))]
        places += [f"reducer.layers.{i}" for i in range(len(self.reducer.layers))]
        places += [f"tail.{i}" for i in range(len(self.tail))]
        return [
            dict(num_chs=self.embed_dim, reduction=patch if i < len(self.base) else semantic, module=module)
            for i, module in enumerate(places)
        ]

    def _needs_grid(self, what: str) -> None:
        if self.reduction is not None or type(self.reducer) not in (SemanticTokenGenerator, AllTokens):
            raise ValueError(f"{what} with tokens='semantic' and 'all': other methods leave the grid")

    def _steps(self, images: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens and their grid after every layer; tokens lie on grids only with the methods that do so."""
        x, hw = self.forward_stem(images)
        for layer in self.base:
            x = self._call(layer, x)
            yield x, hw
        layers = [*self.reducer.layers, *self.tail]
        if isinstance(self.reducer, SemanticTokenGenerator):
            steps = self.reducer.steps(x, hw)
            hw, layers = self.reducer.grid, self.tail
            for x in steps:
                yield x, hw
        for layer in layers:
            x = self._call(layer, x)
            yield x, hw

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Make the model's own size another one: positions are resampled once, instead of for every batch.

        Args:
            img_size: height and width in pixels, or one number for both; None: as it is.
            patch_size: what it is, or None.

        Raises:
            ValueError: another patch size, which would need another projection.
        """
        own = tuple(round(size / cells) for size, cells in zip(self.img_size, self.grid, strict=True))
        if patch_size not in (None, own[0], own):
            raise ValueError(f"patch_size={patch_size}: the patch projection is made for {own[0]} pixels")
        if img_size is None:
            return
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = self.stem.grid(*self.img_size)
        position = resample_abs_pos_embed(
            self.pos_embed.detach(), list(grid), list(self.grid), num_prefix_tokens=self.position_prefix
        )
        self.grid, self.pos_embed = grid, nn.Parameter(position, self.pos_embed.requires_grad)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that are not decayed."""
        tables = {name for name, _ in self.named_parameters() if "relative_position_bias_table" in name}
        return {"pos_embed", "cls_token", "reg_token", "reducer.position"} | tables

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Parameter groups from stem to tail for timm's layer-wise tools, one per layer unless `coarse`."""
        stem = r"^stem|^pos_embed|^cls_token|^reg_token|^norm_pre"
        if coarse:
            return dict(
                stem=stem,
                base=r"^base",
                generation=r"^reducer\.",
                tail=r"^tail|^norm\.|^fc_norm|^attn_pool|^reduction\.",
            )
        return dict(
            stem=stem,
            base=r"^base\.(\d+)",
            # Pooling, global centres and positions belong to the first generation layer.
            generation=[(r"^reducer\.layers\.(\d+)", None), (r"^reducer\.", (0,))],
            tail=r"^tail\.(\d+)",
            # 99999 is timm's mark for "same group as the one before".
            norm=[(r"^norm\.|^fc_norm|^attn_pool|^reduction\.", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable
