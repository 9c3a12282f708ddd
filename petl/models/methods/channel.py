"""Tuning of selected channels: TTC, the paper's second stage, and SCT, which selects by activations (section 2.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from petl.models.channels import ChannelTuning, OutputTuning, QueryValueTuning, StreamTuning
from petl.models.methods.base import Match, Method, chosen_blocks, need
from petl.models.methods.own import LNTune
from petl.models.sites import Backbone, BlockSites

SITES = ("attn", "mlp", "qv", "block")
Channels = Sequence[Sequence[int] | Tensor | Mapping[str, Any]] | str | Mapping[str, str]


class SCT(Method):
    """K x K linear layers on selected channels, one a block; no LayerNorm is tuned.

    Args:
        channels: S of every block, a list of lists of indices (at `qv` of mappings with `q` and `v`); None stands
            for channels that are yet to be chosen: the network has its size and cost, but refuses to be trained.
            In configs, a file of `petl.save_choice` (see `petl.build`).
        k: channels of a block where `channels` is None; below 1, their share of the block's width.
        site: `attn`, the residual stream behind the attention; `mlp`, the MLP's output; `qv`, the q and v parts of qkv;
            `block`, the stream behind the block.
        scale, scale_on, form, rank, init: see `petl.models.channels.ChannelTuning`.
        layers: see `chosen_blocks`; `channels` has an entry for every block of the network all the same.

    Raises:
        ValueError: an unknown site.
    """

    identity: ClassVar[bool] = True

    def __init__(
        self,
        channels: Channels | str | Path | Mapping[str, Any] | None = None,
        k: int | float = 96,
        site: str = "attn",
        scale: float = 1.0,
        scale_on: str = "module",
        form: str = "linear",
        rank: int = 8,
        init: str = "trunc",
        layers: str | Sequence[int] | None = None,
    ) -> None:
        if site not in SITES:
            raise ValueError(f"site='{site}' is none of {list(SITES)}")
        # A file's path, or a stage's file that is not there yet, stays in `source` until `petl.build` has read it.
        self._source = channels if isinstance(channels, (str, Path, Mapping)) else None
        self.channels = None if channels is None or self._source is not None else list(channels)
        self.k, self.site, self.scale, self.scale_on = k, site, scale, scale_on
        self.form, self.rank, self.init, self.layers = form, rank, init, layers

    @property
    def source(self) -> Any:
        """Where the channels are to be read from, if that was given in place of the channels."""
        return self._source

    @property
    def starts_as_backbone(self) -> bool:
        """Whether the modules begin as the identity."""
        return self.init == "zero" and (self.scale_on == "module" or self.scale == 1.0)

    def match(self, backbone: Backbone) -> Match:
        """One module a block; none in a block without channels.

        Raises:
            ValueError: `channels` has not one entry for every block.
        """
        if self.channels is not None and len(self.channels) != len(backbone.blocks):
            raise ValueError(f"channels of {len(self.channels)} blocks for a network of {len(backbone.blocks)}")
        found = Match(chosen=self.channels is not None)
        for index, block in chosen_blocks(backbone, self.layers):
            module = self._module(backbone, block, None if self.channels is None else self.channels[index])
            if module is not None:
                found.modules[f"{block.block.name}.{self.site}"] = module
        return need(found, self, backbone)

    def _module(self, backbone: Backbone, block: BlockSites, chosen: Any) -> nn.Module | None:
        if self.site == "qv":
            place = backbone.site(block, "qkv")
            parts = [self._tuning(chosen if chosen is None else chosen[part], block.dim, -1) for part in ("q", "v")]
            module: Any = QueryValueTuning(*parts)
            module.attach(place)
            return module if any(len(part.channels) for part in parts) else None
        if self.site == "attn":
            end = backbone.site(block, "end1")
            tuning = self._tuning(chosen, block.dim, end.axis)
            if not len(tuning.channels):
                return None
            module = StreamTuning(tuning)
            # The branch's norm has the stream before the attention as its input.
            module.attach(backbone.site(block, "norm1"), end)
            return module
        place = backbone.site(block, self.site)
        tuning = self._tuning(chosen, block.dim, place.axis)
        if not len(tuning.channels):
            return None
        module = OutputTuning(tuning)
        module.attach(place)
        return module

    def _tuning(self, chosen: Any, dim: int, axis: int) -> ChannelTuning:
        if chosen is None:
            chosen = range(round(self.k * dim) if 0 < self.k < 1 else int(self.k))
        return ChannelTuning(
            chosen,
            dim,
            scale=self.scale,
            scale_on=self.scale_on,
            form=self.form,
            rank=self.rank,
            init=self.init,
            axis=axis,
        )


class TTC(SCT):
    """The paper's second stage: modules as SCT's on channels chosen by Taylor scores, above aligned LayerNorms.

    The LayerNorms of the first stage belong to what is saved, and are trained on only with `tune_norm`.

    Args:
        tune_norm: LayerNorms are trained beside the channels (unknown in the paper; off, as its abstract says).
        channels, k, site, scale, scale_on, form, rank, init, layers: see `SCT`.
    """

    def __init__(
        self,
        channels: Channels | str | Path | Mapping[str, Any] | None = None,
        k: int | float = 96,
        site: str = "attn",
        scale: float = 1.0,
        scale_on: str = "module",
        form: str = "linear",
        rank: int = 8,
        init: str = "trunc",
        layers: str | Sequence[int] | None = None,
        tune_norm: bool = False,
    ) -> None:
        super().__init__(channels, k, site, scale, scale_on, form, rank, init, layers)
        self.tune_norm = tune_norm

    def match(self, backbone: Backbone) -> Match:
        """As SCT's, with the LayerNorms kept or trained."""
        norms = LNTune().match(backbone).trained
        found = super().match(backbone)
        if self.tune_norm:
            found.trained = norms
        else:
            found.kept = norms
        return found
