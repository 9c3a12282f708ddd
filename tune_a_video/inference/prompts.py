"""Where the prompts of a clip's edits come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.errors import ConfigError

Prompts = Sequence[str] | Callable[[str], Sequence[str]] | None


class DrawnEdits:
    """The eight edits of a caption of the stand-in's world, by rule."""

    def __call__(self, caption: str) -> list[str]:
        """Captions of the edits.

        Raises:
            ValueError: no caption of that world.
        """
        from tune_a_video.standin import edits, parse_caption

        return [made.prompt for made in edits(parse_caption(caption))]


def prompts_of(batch: Mapping[str, Any], index: int, prompts: Prompts) -> list[str]:
    """The prompts for one clip of a batch: the configured ones, else the data set's own `edits`.

    Raises:
        ConfigError: there are none, or something that is no text.
    """
    if callable(prompts):
        found = list(prompts(batch["caption"][index]))
    elif prompts:
        found = list(prompts)
    else:
        found = [texts[index] for texts in dict(batch.get("edits") or {}).values()]
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise ConfigError(
            f"no prompts for {batch['sample_id'][index]} ({found!r}): set model.prompts=['...','...'] to the texts of "
            "the edits"
        )
    return found
