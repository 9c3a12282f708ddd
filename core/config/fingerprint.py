"""When two configs mean the same run: they agree on everything that can change its numbers.

Left out is where things are stored, how the run is watched and how fast the machine is fed (see
`core.config.influence`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from core.config import shortened
from core.config.composition import to_dict
from core.config.influence import WATCHING, influential, without_declared, without_defaults

# Top-level keys that say where a run is kept and how it is watched.
_BOOKKEEPING = (
    "runs_dir",
    "run_dir",
    "resume",
    "resume_changes",
    "resume_from",
    "forked_from",
    "stage_of",
    "overrides",
    "started_by",
    "components",
    "without_influence",
    "paper",
    "hydra",
    *WATCHING,
)
# Keys of `runtime` that change numbers; the others choose a device, a compiler, a wrapper.
_RUNTIME = ("precision", "debug")
# Keys of `checkpoint` that say which is best; the others say when and how many are kept.
_CHECKPOINT = ("metric", "direction")
# Keys, at any depth, that belong to the machine.
_MACHINE = frozenset(
    {"root", "data_root", "cache_dir", "num_workers", "pin_memory", "prefetch_factor", "persistent_workers"}
)


def relevant(cfg: Any) -> dict[str, Any]:
    """The part of a resolved config that can change a run's numbers, as plain containers."""
    return influential(_formerly_relevant(without_declared(to_dict(cfg))))


def _formerly_relevant(cfg: Any) -> dict[str, Any]:
    """As `relevant` was when the first results were stored: hooks that only watch and the like count, too."""
    plain = to_dict(cfg)
    kept = without_defaults({k: _without_machine(v) for k, v in plain.items() if k not in _BOOKKEEPING})
    if "custom_hooks" in kept:
        hooks = kept["custom_hooks"] or []  # names of hooks change no numbers
        kept["custom_hooks"] = [h for h in hooks.values() if h is not None] if isinstance(hooks, Mapping) else hooks
    if isinstance(kept.get("runtime"), Mapping):
        runtime = kept["runtime"]
        kept["runtime"] = {key: runtime[key] for key in _RUNTIME if key in runtime} | shortened.settings(runtime)
    if isinstance(kept.get("checkpoint"), Mapping):
        kept["checkpoint"] = {key: value for key, value in kept["checkpoint"].items() if key in _CHECKPOINT}
    return kept


def _without_machine(node: Any) -> Any:
    if isinstance(node, str) and node.startswith("/"):
        return node.rstrip("/").rpartition("/")[2]  # where a file lies is the machine's business, which one is ours
    if isinstance(node, Mapping):
        return {str(key): _without_machine(value) for key, value in node.items() if key not in _MACHINE}
    if isinstance(node, list | tuple):
        return [_without_machine(value) for value in node]
    return node


def fingerprint(cfg: Any) -> str:
    """Sixteen hexadecimal digits that two configs share exactly when `relevant` gives the same for both."""
    return digest(relevant(cfg))


def fingerprints(cfg: Any) -> Iterator[str]:
    """The one under which results of this config may have been stored earlier, and `fingerprint`."""
    yield digest(_formerly_relevant(cfg))
    yield fingerprint(cfg)


def digest(data: Any) -> str:
    """Sixteen hexadecimal digits of JSON-ready data; the order of keys does not matter."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """Where two plain containers first differ, e.g. ``model.network.depth: 6 there, 5 here``; None when they agree."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(k for k in right if k not in left)]:
            inner = f"{path}.{key}" if path else str(key)
            if key not in left or key not in right:
                return f"{inner} is only {'there' if key in left else 'here'}"
            found = first_difference(left[key], right[key], inner)
            if found:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            found = first_difference(one, other, f"{path}.{index}")
            if found:
                return found
        return None
    return None if left == right else f"{path}: {left!r} there, {right!r} here"
