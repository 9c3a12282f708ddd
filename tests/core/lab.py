"""The tiny experiment with a runner that trains nothing: it files results as a run would, with known metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from omegaconf import DictConfig

from core.config import compose, to_dict
from core.errors import VitrineError


class Lab:
    """Composes configs of the `user` folder and "trains" them by writing `result.json` and `config.yaml`.

    Args:
        user: the folder of the `user` fixture.
        runs: where runs are filed.
        score: resolved config -> metrics.
    """

    def __init__(self, user: Path, runs: Path, score: Callable[[dict], dict[str, float]]) -> None:
        self.user = user
        self.runs = runs
        self.score = score
        self.trained: list[dict] = []
        self.fail_on: Callable[[dict], bool] = lambda cfg: False
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: list[str]) -> DictConfig:
        """As `core.config.composition.compose`, with the user's experiments; the same words are composed once."""
        key = tuple(overrides)
        if key not in self._composed:
            self._composed[key] = compose(overrides, config_dir=self.user / "configs")
        return self._composed[key].copy()

    def run(self, cfg) -> dict:
        """Files a finished run; an unchanged config that is already there is trained again all the same."""
        plain = to_dict(cfg)
        if self.fail_on(plain):
            raise VitrineError("the disc is on fire")
        self.trained.append(plain)
        folder = Path(plain["runs_dir"]) / plain["name"] / f"2024-01-01_{len(self.trained):06d}"
        folder.mkdir(parents=True)
        result = {
            "name": plain["name"],
            "overrides": plain["overrides"],
            "seed": plain["seed"],
            "status": "finished",
            "metrics": self.score(plain),
            "parameters": 818,
            "trainable_parameters": 818,
            "seconds": 2.0,
            "peak_memory_mb": 1.0,
            "device": "abacus",
            "versions": {"torch": "2"},
            "commit": "c0ffee",
            "run_dir": str(folder),
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        (folder / "result.json").write_text(json.dumps(result))
        return result
