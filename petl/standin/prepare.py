"""The preparation task of the stand-in: source networks, trained by the engine and kept as files of weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.checkpoint import load, save_atomic
from core.checkpoint.run_folder import find_checkpoint
from core.data.prepare import preparer

ROOT = "data/cue_swap"


@preparer("cue_source")
def cue_source(output: Path = Path(ROOT), seeds: list[int] | None = None, threads: int | None = None) -> str:
    """Trains the networks that petl/cue_* transfer (petl/cue_source), each on images of its seed.

    Args:
        output: folder of the weights, ``source_SEED.safetensors``.
        seeds: of the sources; 0 when null. What is there already is kept.
        threads: of the CPU.
    """
    from core.config.composition import compose
    from core.engine.launch import run

    lines = []
    for seed in seeds or [0]:
        path = output / f"source_{seed}.safetensors"
        if path.is_file():
            lines.append(f"{path}: was there")
            continue
        folder = output / "runs" / f"source_{seed}"
        words = ["experiment=petl/cue_source", "runtime=cpu", f"seed={seed}", f"run_dir={folder}", "resume=auto"]
        result = run(compose([*words, *([f"runtime.threads={threads}"] if threads else [])]))
        state = load(find_checkpoint(folder))["model"]
        prefix = "network."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        output.mkdir(parents=True, exist_ok=True)
        save_atomic({name: value.contiguous() for name, value in weights.items()}, path)
        shutil.rmtree(folder)
        lines.append(f"{path}: the place is right in {result['metrics']['top1']:.1%} of the test images")
    return "\n".join(lines)
