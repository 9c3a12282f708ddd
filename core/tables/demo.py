"""A paper's front door: its idea beside its baseline in a few minutes, as ``PAPER/tables/demo.yaml`` says.

The file is a table (see `core.tables.table_file`) whose rows are trained, with one key more::

    demo:
      says: Sixteen semantic tokens instead of 196 patches, on real digits.   # printed first
      minutes: 5                           # on two cores
      prepare:                             # what has to be there first, made once and kept
        - {task: tiny_sd, arguments: [output=data/tiny_sd], makes: data/tiny_sd/tiny_sd.json, minutes: 12}
      images:                              # copied from the runs; `row` left out: of every row
        - {row: STViT, files: media/*tokens_*.png, output: tokens.png, shows: what each semantic token attends to}
      next: [python tools/table.py stvit/digits run=true seeds=3]   # what to try
      quick: [train_cfg.max_epochs=1]      # overrides of a run at reduced length
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.composition import compose
from core.errors import ConfigError, nearest
from core.tables.table_file import Overrides, Reader, TableSpec, read_table

if TYPE_CHECKING:
    from core.tables.table import Evaluation

NAME = "demo"


@dataclass(frozen=True)
class Preparation:
    """A task of `core.data.prepare` that has to have run; `makes` is there when it has."""

    task: str
    makes: str
    minutes: float
    arguments: Overrides = ()


@dataclass(frozen=True)
class Shown:
    """Images of a run: the newest of `files` (a pattern below the run's folder) is copied to `output`."""

    files: str
    output: str
    shows: str
    row: str | None = None


@dataclass(frozen=True)
class Demo:
    """What a paper's demo file says beside the table."""

    table: TableSpec
    says: str
    minutes: float
    prepare: tuple[Preparation, ...] = ()
    images: tuple[Shown, ...] = ()
    next: tuple[str, ...] = ()
    quick: Overrides = ()


@dataclass
class Options:
    """Whose demo, and where it goes."""

    paper: str = field(default="stvit", metadata={"help": "package whose demo is shown"})
    output: str | None = field(default=None, metadata={"help": "folder of runs and images; null: runs/demo/PAPER"})
    seed: int = field(default=0, metadata={"help": "of all trainings"})
    threads: int = field(default=2, metadata={"help": "CPU threads"})
    quick: bool = field(default=False, metadata={"help": "at reduced length: whether it runs, not what it shows"})


def load_demo(path: str | Path) -> Demo:
    """Reads and checks a demo file.

    Raises:
        ConfigError: it is not as described above; names file, place and nearest valid word.
    """
    reader = Reader(Path(path))
    data = reader.load()
    said = reader.mapping(data.pop("demo", None), "demo")
    demo = reader.fill(Demo, said, "demo", table=read_table(reader, data))
    for index, image in enumerate(demo.images):
        if image.row is not None:
            reader.known(image.row, f"demo.images[{index}].row", [row.label for row in demo.table.rows], "row")
    return demo


def show(demo: Demo, options: Options, overrides: Sequence[str] = ()) -> None:
    """Prepares, trains what is missing, prints the table, copies the images and says what to try next.

    A demo that was stopped goes on; one that has ended shows its figures again.

    Raises:
        core.errors.VitrineError: a row could not be trained.
    """
    from core.data.prepare import run_task
    from core.engine.launch import build_trainer, run
    from core.errors import VitrineError
    from core.output.render import emit
    from core.profile.figures import Figures
    from core.tables.runs import Results, launcher
    from core.tables.table import Evaluation, measure_table, side_by_side, train_missing

    paper = demo.table.id.partition("/")[0]
    output = Path(options.output or f"runs/demo/{paper}")
    print(demo.says)
    print(f"Some {demo.minutes:g} minutes on two cores; {output} keeps runs, images and figures.", flush=True)
    for step in demo.prepare:
        if not Path(step.makes).exists():
            print(f"First, once: {step.task}, some {step.minutes:g} minutes; {step.makes} is kept.", flush=True)
            run_task(paper, step.task, list(step.arguments))
    words = [f"runs_dir={output}", "runtime=cpu", f"runtime.threads={options.threads}", f"seed={options.seed}"]
    words += overrides
    table = shortened(demo) if options.quick else demo.table

    def evaluation(**more: Any) -> Evaluation:
        results = Results(output, compose)
        figures = Figures(build_trainer)
        return Evaluation(
            table, compose=compose, figures=figures, results=results, seeds=[options.seed], overrides=words, **more
        )

    failures = train_missing(evaluation(), [options.seed], launcher(run, tool=NAME))
    if failures:
        raise VitrineError("not everything could be trained:\n" + "\n".join(failures))
    measured = None if options.quick else measure_table(evaluation(), build_trainer)
    shown = side_by_side(evaluation(measured=measured), "ours")
    shown.notes = [*shown.notes, f"Seed {options.seed}, one run a row{', at reduced length' if options.quick else ''}."]
    print()
    emit(shown)
    emit(shown, "json", output / "figures.json", quiet=True)
    for line in _copied(demo, evaluation(), options.seed, output):
        print(line)
    if demo.next:
        print("\nTry next:\n" + "\n".join(f"  {line}" for line in demo.next))


def shortened(demo: Demo) -> TableSpec:
    """The table with `quick` among the overrides of the rows that train."""
    rows = []
    for row in demo.table.rows:
        trains = row.experiment is not None and compose([f"experiment={row.experiment}", *row.overrides]).train_cfg
        rows.append(replace(row, overrides=(*row.overrides, *demo.quick)) if trains else row)
    return replace(demo.table, rows=tuple(rows))


def _copied(demo: Demo, evaluation: Evaluation, seed: int, output: Path) -> Iterator[str]:
    """Copies the images out of the runs' folders: a line for each, also where a run left none."""
    for image in demo.images:
        for row in evaluation.spec.rows:
            if image.row not in (None, row.label):
                continue
            run = evaluation.run_of(row, seed)
            files = sorted(run.glob(image.files)) if run is not None else []
            if not files:
                yield f"{row.label}: no image {image.files} in {run or 'any run'}; it would show {image.shows}"
                continue
            own = Path(image.output)
            suffix = "" if image.row else "_" + re.sub(r"\W+", "_", row.label).strip("_")
            target = output / f"{own.stem}{suffix}{own.suffix}"
            shutil.copyfile(files[-1], target)
            yield f"{target}: {image.shows}"


def main(argv: list[str], doc: str) -> None:
    """``tools/demo.py``."""
    from core.config.command.cli import parse
    from core.tables.table import default_roots

    options, overrides = parse(argv, Options, doc=doc, overrides=True)
    demos = {p.parents[1].name: p for root in default_roots() for p in sorted(Path(root).glob(f"*/tables/{NAME}.yaml"))}
    if options.paper not in demos:
        near = nearest(options.paper, demos)
        raise ConfigError(f"paper={options.paper}: it has no demo{near} (these have: {', '.join(demos) or 'none'})")
    show(load_demo(demos[options.paper]), options, overrides)
