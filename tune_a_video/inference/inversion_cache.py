"""Inverted latents are kept on disk: for more prompts on the same tuned network they are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_VERSION = 1


def cached_inversion(
    folder: Path,
    unet: nn.Module,
    scheduler: Any,
    latents: Tensor,
    text: Tensor,
    settings: Mapping[str, Any],
    compute: Callable[[], Tensor],
) -> Tensor:
    """What `compute` gives, from the folder if it was computed before from the same things.

    Args:
        folder: of all inversions; each has one below it, named by a hash of what it was made from.
        unet: the network; its weights and configuration count.
        scheduler: its configuration counts.
        latents, text: what is inverted, and under which text.
        settings: whatever else decides the result.
        compute: the inversion.
    """
    from core.data import DerivedCache, hash_state

    provenance = json.loads(
        json.dumps(
            {
                "version": _VERSION,
                "weights": hash_state(unet.state_dict()),
                "network": _public(unet.config),
                "scheduler": _public(scheduler.config),
                "inputs": hash_state({"latents": latents, "text": text.float()}),
                **settings,
            },
            default=str,
        )
    )
    key = blake2b(json.dumps(provenance, sort_keys=True).encode(), digest_size=8).hexdigest()
    with DerivedCache(folder / key, provenance, ids=["inversion"], rank=0, world_size=1) as cache:
        if cache.missing():
            result = compute()
            cache.write(["inversion"], {"latents": result[None]})
            return result
        return cache["inversion"]["latents"].to(latents.device)


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the library's version and the folder it came from, which decide nothing."""
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}
