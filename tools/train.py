"""Trains one experiment: `python tools/train.py experiment=stvit/digits`; `--help` and `--list` tell the rest."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

import os
import sys
import traceback
from string import Template
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from core.config.command.cli import run as run_tool
from core.config.command.cli import stop
from core.config.command.console import folded, listing
from core.config.composition import (
    CANNOT_COMPOSE,
    CONFIGS,
    broken_file,
    choices,
    command_line,
    experiments,
    explain_overrides,
    with_overrides,
)
from core.engine.run import rerun, sweep
from core.errors import ConfigError, VitrineError

_WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
def train(cfg: DictConfig) -> Any:
    """One job: a single run, or one of a multirun; returns the run's objective."""
    from core.config.command.signals import Interrupted
    from core.engine.launch import run

    several = sweep.in_multirun()
    try:
        cfg = with_overrides(cfg, hydra.core.hydra_config.HydraConfig.get().overrides.task)
        return sweep.run_job(cfg, run) if several else run(cfg)["objective"]
    except Interrupted as error:
        stop(error)
    except VitrineError as error:
        if several:
            raise
        stop(error)
    except Exception:
        if several or _WANTS_TRACEBACK:
            raise
        traceback.print_exc()  # from here on: Hydra's own frames say nothing
        raise SystemExit(1) from None


def _config_dir(argv: list[str]) -> str | None:
    for index, word in enumerate(argv):
        if word in ("--config-dir", "-cd") and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith("--config-dir="):
            return word.partition("=")[2]
    return None


def _list(argv: list[str]) -> None:
    print(listing(experiments(_config_dir(argv))))


def _help(argv: list[str]) -> None:
    """Hydra's help in the terminal's width, without Hydra, which reads every file for it."""
    template = Template(OmegaConf.load(CONFIGS / "train.yaml").hydra.help.template)
    listed = "".join(f"{group}: {', '.join(names)}\n" for group, names in choices(_config_dir(argv)).items())
    said = template.safe_substitute(APP_CONFIG_GROUPS=listed)
    print("\n".join(folded(line) for line in said.splitlines()))


def _complete_experiment(argv: list[str]) -> bool:
    """Answers the shell for a word that begins with ``experiment=``: Hydra completes no names with a slash."""
    word = os.environ.get("COMP_LINE", "").rpartition(" ")[2]
    if not word.startswith("experiment=") or not any(a.startswith("query=") for a in argv):
        return False
    print(" ".join(w for w in (f"experiment={name}" for name in experiments(_config_dir(argv))) if w.startswith(word)))
    return True


def _rerun(flags: list[str], overrides: list[str], config_dir: str | None) -> None:
    """A run again, from its stored config."""
    cfg = rerun.rerun_config([flag for flag in flags if not _of_config_dir(flag, config_dir)], overrides, config_dir)
    from core.engine.launch import run

    run(cfg)


def _of_config_dir(flag: str, config_dir: str | None) -> bool:
    return flag in ("--config-dir", "-cd", config_dir) or flag.startswith("--config-dir=")


def main(argv: list[str]) -> None:
    """Hydra's command line, with ``--list``, and one message where something is wrong with it."""
    if "--list" in argv:
        _list(argv)
        return
    if _complete_experiment(argv):
        return
    if "--help" in argv or "-h" in argv:
        _help(argv)
        return
    flags, overrides = command_line(argv, _config_dir(argv))
    if rerun.asked(overrides):
        _rerun(flags, overrides, _config_dir(argv))
        return
    sys.argv[1:] = [*flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them beside ours
    try:
        train()
    except VitrineError as error:  # of a job, by way of a sweeper or launcher with rules of its own
        raise VitrineError(sweep.report() or str(error)) from None
    except (*CANNOT_COMPOSE, ValueError, OSError, RecursionError) as error:  # Hydra's and its plugins' own
        # What fails after composing, such as a disk that a run cannot write to, passes as it is.
        composed = not isinstance(error, (*CANNOT_COMPOSE, ValueError)) and broken_file(_config_dir(argv)) is None
        if _WANTS_TRACEBACK or composed:
            raise
        said = explain_overrides(overrides, _config_dir(argv)) or str(error).strip()
        raise ConfigError("\n".join(filter(None, (said, sweep.report())))) from None
    except BaseException:
        if (failed := sweep.report()) is not None:
            print(failed, file=sys.stderr)
        raise
    finally:
        sweep.conclude()
    if (failed := sweep.report()) is not None:
        raise VitrineError(failed)


if __name__ == "__main__":
    run_tool(main)
