"""Trains one experiment: `python tools/train.py experiment=stvit/digits`; `--help` and `--list` tell the rest."""

from __future__ import annotations

import os
import sys

import hydra
from omegaconf import DictConfig, open_dict

from core.cli import stop
from core.config import CONFIGS, experiments, explain_overrides
from core.console import listing
from core.errors import VitrineError

_started = False


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> float | None:
    """One job: a single run, or one of a multirun."""
    global _started
    _started = True
    with open_dict(cfg):
        cfg.overrides = list(hydra.core.hydra_config.HydraConfig.get().overrides.task)
    from core.launch import run

    try:
        return run(cfg).get("objective")
    except VitrineError as error:
        stop(error)


def _config_dir(argv: list[str]) -> str | None:
    for index, word in enumerate(argv):
        if word in ("--config-dir", "-cd") and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith("--config-dir="):
            return word.partition("=")[2]
    return None


def _list(argv: list[str]) -> None:
    print(listing(experiments(_config_dir(argv))))


def _complete_experiment(argv: list[str]) -> bool:
    """Answers the shell for a word that begins with ``experiment=``: Hydra completes no names with a slash."""
    word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
    if not word.startswith("experiment=") or not any(a.startswith("query=") for a in argv):
        return False
    print(" ".join(w for w in (f"experiment={name}" for name in experiments(_config_dir(argv))) if w.startswith(word)))
    return True


def main() -> None:
    """Hydra's command line, with ``--list`` and the nearest existing names behind Hydra's error messages."""
    argv = sys.argv[1:]
    if "--list" in argv:
        _list(argv)
        return
    if _complete_experiment(argv):
        return
    try:
        train()
    except SystemExit as stop:
        if stop.code and not _started:
            overrides = [word for word in argv if word.startswith("~") or ("=" in word and not word.startswith("-"))]
            hint = explain_overrides(overrides, _config_dir(argv))
            if hint:
                print(f"error: {hint}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
