"""Which cue the chosen channels carry: ``python -m petl.standin.chosen [RUNS]`` reads petl/cue_two_stage.

The stem of a source network reads each colour by channels of its own, and the residual stream keeps them: at the first
block it can be told whether a score points to the colour that counts in the target or to the one that counted before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from core.config.files import read_json
from petl.checkpoint import load_choice
from petl.standin.source import STEM


def carried(channels: Sequence[int]) -> tuple[int, int]:
    """How many of a block's channels read the first and the second colour in the stem, each of six."""
    old, new = STEM[0] + STEM[1], sum(STEM)
    return sum(STEM[0] <= c < old for c in channels), sum(old <= c < new for c in channels)


def main(words: Sequence[str]) -> None:
    """Prints a line for every finished run: score, seed, and the counts of every block."""
    runs = Path(words[0] if words else "runs/petl/cue_two_stage")
    lines = []
    for file in runs.glob("*/result.json"):
        choice = file.parent / "stage_1_choose" / "channels.safetensors"
        if file.parent.is_symlink() or not choice.is_file():
            continue
        channels, scores = load_choice(choice)
        blocks = "  ".join("{} old {} new".format(*carried(block)) for block in channels)
        result = read_json(file)
        options = " ".join(word for word in result["overrides"] if word.startswith(("vars.", "stages.")))
        lines.append(f"{scores.origin['score']:12} seed {result['seed']:3}  {blocks}  {options}")
    print("\n".join(sorted(lines)) or f"no finished run in {runs}")


if __name__ == "__main__":
    main(sys.argv[1:])
