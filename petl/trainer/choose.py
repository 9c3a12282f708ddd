"""The step between the two stages: score every channel, choose, write the choice and its picture (section 2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import ConfigError, nearest
from petl.checkpoint import save_choice
from petl.models.importance import (
    SELECTORS,
    Scores,
    channel_scores,
    random_scores,
    salience,
    weight_magnitude,
)

FILE = "channels.safetensors"


class ChooseChannels:
    """What a stage's `compute` names: the channels that the next stage tunes.

    Writes ``channels.safetensors`` (indices, scores, origin) and ``importance.png``.

    Args:
        score: `taylor`, `fisher` (Taylor in the reduction `squared`), `bottom` (the smallest Taylor scores), `salience`
            (SCT), `activation` (the same without classes), `magnitude`, `random`.
        k: channels of a block; below 1, their share of its width.
        site: where they are; see `petl.SCT`.
        reduction, tokens, num_images: see `petl.channel_scores`.
        allocation: `per_layer` or `global`; see `petl.select_channels`.
        seed: of `random`.

    Raises:
        ConfigError: an unknown score.
    """

    def __init__(
        self,
        score: str = "taylor",
        k: int | float = 96,
        site: str = "attn",
        reduction: str = "abs_of_sum",
        tokens: str = "all",
        num_images: int | None = None,
        allocation: str = "per_layer",
        seed: int = 0,
    ) -> None:
        if score not in SELECTORS:
            raise ConfigError(f"score '{score}' is none of {list(SELECTORS)}{nearest(score, SELECTORS)}")
        self.score, self.k, self.site, self.reduction = score, k, site, reduction
        self.tokens, self.num_images, self.allocation, self.seed = tokens, num_images, allocation, seed

    def __call__(self, trainer: Any, loader: Any, folder: Path) -> dict[str, Any]:
        """Figures: `images`, `flatness` (share of the whole score that the chosen channels hold) and `seconds`."""
        import time

        from petl.inference.importance import importance_page

        begun = time.perf_counter()
        scores = self.scores(trainer.network, loader)
        channels = scores.select(self.k, self.allocation, smallest=self.score == "bottom")
        dataset = loader.dataset
        data = getattr(dataset, "origin", None)
        save_choice(
            folder / FILE,
            channels,
            scores,
            k=self.k,
            allocation=self.allocation,
            smallest=self.score == "bottom",
            data=data() if callable(data) else data or type(dataset).__name__,
        )
        importance_page(scores, channels).save(folder / "importance.png")
        return {
            "images": scores.origin.get("images", 0),
            "chosen_share": chosen_share(scores, channels),
            "seconds": time.perf_counter() - begun,
        }

    def scores(self, network: Any, loader: Any) -> Scores:
        """The scores that the choice is made from."""
        if self.score == "random":
            return random_scores(network, self.site, self.seed)
        if self.score == "magnitude":
            return weight_magnitude(network, self.site)
        if self.score in ("salience", "activation"):
            by_class = self.score == "salience"
            return salience(network, loader, site=self.site, by_class=by_class, num_images=self.num_images)
        reduction = "squared" if self.score == "fisher" else self.reduction
        scores = channel_scores(
            network, loader, site=self.site, reduction=reduction, tokens=self.tokens, num_images=self.num_images
        )
        scores.origin["score"] = self.score
        return scores


def chosen_share(scores: Scores, channels: list[Any]) -> float:
    """The share of the scores' sum that the chosen channels hold, over all blocks: K / C where scores are flat."""
    held = total = 0.0
    for part, values in scores.values.items():
        for value, chosen in zip(values, channels, strict=True):
            held += float(value[chosen[part] if part else chosen].sum())
            total += float(value.sum())
    return held / total if total else 0.0
