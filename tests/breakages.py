"""Breaks promises on purpose, one line at a time, and holds that the tests notice.

  python -m tests.breakages                   40 breakages in a copy of this tree; some minutes on one core
  python -m tests.breakages only=[EMA,claims]  those whose name holds one of the words

Each names a line, what it becomes, and the tests that must turn red; they have to be green before. A breakage that
stays green is a fault of the tests. Writes results/breakages.json.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Breakage:
    """A line that breaks a promise.

    name: the promise, in a few words.
    file: of the tree.
    old: part of one line, which is there once.
    new: what it becomes.
    tests: what must turn red, as pytest takes it, below tests/.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __init__(self, name: str, file: str, old: str, new: str, *tests: str) -> None:
        for key, value in dict(name=name, file=file, old=old, new=new, tests=tests).items():
            object.__setattr__(self, key, value)

    def broken(self, text: str) -> str:
        """The file's text with the breakage.

        Raises:
            ValueError: the line is not there, or not once.
        """
        if (count := text.count(self.old)) != 1 or "\n" in self.old + self.new:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {count} times: name another line")
        return text.replace(self.old, self.new)


BREAKAGES = (
    # ------------------------------------------------------------------ order of data, exact resume
    Breakage(
        "sampler: every epoch has an order of its own",
        "core/data/loading/sampling.py",
        "derive_seed(self.seed, epoch, _ORDER)",
        "derive_seed(self.seed, 0, _ORDER)",
        "core/test_data_sampling.py::test_an_epoch_is_a_function_of_seed_and_epoch",
    ),
    Breakage(
        "sampler: processes share one line of samples",
        "core/data/loading/sampling.py",
        "range(self.rank + skip * self.world_size,",
        "range(self.rank + skip,",
        "core/test_data_sampling.py::test_every_process_goes_on_behind_what_it_has_drawn",
    ),
    Breakage(
        "evaluation sees every sample exactly once",
        "core/data/loading/sampling.py",
        "range(self.rank, len(self.dataset), self.world_size)",
        "range(self.rank, len(self.dataset) - 1, self.world_size)",
        "core/test_data_sampling.py::test_evaluation_sees_every_sample_exactly_once",
    ),
    Breakage(
        "evaluation: a sample's randomness is its own",
        "core/data/loading/seeded.py",
        "seed = derive_seed(_EVALUATION, candidate)",
        "seed = derive_seed(_EVALUATION)",
        "core/test_data_loader.py::test_plain_indices_are_seeded_in_evaluation_only",
    ),
    Breakage(
        "resume: an epoch goes on at the batch where it stopped",
        "core/data/loading/batching.py",
        "position = start * self.batch_sampler.batch_size",
        "position = (start - 1) * self.batch_sampler.batch_size",
        "core/test_data_sampling.py::test_a_pass_resumes_at_any_batch",
    ),
    Breakage(
        "resume: with another batch, at the same sample or the next epoch",
        "core/data/loading/position.py",
        "before * taken % now == 0",
        "before * taken % now >= 0",
        "core/test_position.py::test_where_no_whole_batches_lead_there_the_next_epoch_begins",
    ),
    Breakage(
        "resume: gradients of an unfinished window go on",
        "core/optim/wrapper.py",
        'gradient = accumulation["gradients"].get(index)',
        "gradient = None",
        "core/test_optim_wrapper.py::test_resuming_anywhere_in_a_window_is_bit_exact",
    ),
    Breakage(
        "resume: a config that changes figures is refused",
        "core/engine/run/resume.py",
        "wrong = [d for d in found if not (d.of_length or d.of_evaluation or d.named_by(named))]",
        "wrong = []",
        "core/test_engine_going_on.py::test_what_a_run_does_not_go_on_with_is_an_error_and_changes_nothing",
    ),
    Breakage(
        "evaluation leaves the run's randomness as it was",
        "core/engine/state/randomness.py",
        "        set_random_state(state)",
        "        pass",
        "core/test_engine_sanity.py::test_generators_and_batch_norms_are_as_they_were",
    ),
    # ------------------------------------------------------------------ averages, optimizers, schedules
    Breakage(
        "EMA: the average moves by one minus the decay",
        "core/optim/ema.py",
        "weights, 1.0 - self.next_decay())",
        "weights, self.next_decay())",
        "core/test_ema.py::test_constant_decay_in_closed_form",
    ),
    Breakage(
        "EMA: trained weights come back after an evaluation",
        "core/optim/ema.py",
        "local(source).copy_(self._backup[name])",
        "local(source).copy_(local(source))",
        "core/test_ema.py::test_swapping_gives_the_averaged_weights_and_every_bit_back",
    ),
    Breakage(
        "EMA: the hook averages after updates, not micro-steps",
        "core/engine/hooks/ema.py",
        "if updates > self._seen:",
        "if updates >= self._seen:",
        "core/test_ema.py::test_the_hook_averages_after_updates_not_micro_steps",
    ),
    Breakage(
        "accumulation: micro-batches train like the big batch",
        "core/optim/wrapper.py",
        "return loss if window == 1 else loss / window",
        "return loss",
        "core/test_optim_wrapper.py::test_accumulated_micro_batches_train_like_the_big_batch_even_in_the_last_short_window",
    ),
    Breakage(
        "a phase trains its own network alone",
        "core/optim/wrapper.py",
        "p.requires_grad_(False)",
        "p.requires_grad_(True)",
        "core/test_optim_wrapper.py::test_a_phase_trains_its_own_network_alone_through_the_other",
    ),
    Breakage(
        "schedules keep the ratios of groups",
        "core/optim/schedules.py",
        "self._set(group, current * ratio)",
        "self._set(group, current)",
        "core/test_schedules.py::test_groups_keep_their_ratios_and_tags_choose_groups",
    ),
    Breakage(
        "biases are not decayed",
        "core/optim/groups.py",
        'is_bias = bias and name.rpartition(".")[2] == "bias"',
        "is_bias = False",
        "core/test_optim_groups.py::test_decay_rules_one_by_one",
    ),
    Breakage(
        "no update is made with a gradient that is not finite",
        "core/engine/hooks/finite.py",
        "self._harmed = bool(harmed.any())",
        "self._harmed = False",
        "core/test_engine_gradients.py::test_it_stops_before_the_weights_are_written",
    ),
    # ------------------------------------------------------------------ checkpoints
    Breakage(
        "checkpoints: the bytes reach the disk before the name changes",
        "core/config/files.py",
        "            os.fsync(file.fileno())",
        "            pass",
        "core/test_checkpoint_files.py::test_the_bytes_reach_the_disk_before_the_name_changes",
    ),
    Breakage(
        "checkpoints: damaged files are passed over",
        "core/checkpoint/store.py",
        "return archive.testzip() is None",
        "return True",
        "core/test_checkpoint_store.py::test_altered_bytes_are_noticed_with_and_without_the_index",
    ),
    Breakage(
        "checkpoints: the best stays",
        "core/checkpoint/store.py",
        'sign = -1 if self.ranking[metric] == "higher" else 1',
        "sign = -1",
        "core/test_checkpoint_store.py::test_keep_best_and_best",
    ),
    Breakage(
        "safety: a pickle names only what is allowed",
        "core/checkpoint/official/unpickler.py",
        'if "." in name or full not in self.allow:',
        'if "." in name:',
        "core/test_checkpoint_official.py::test_a_file_that_would_execute_code_is_refused",
    ),
    Breakage(
        "safety: a file does not unpack to far more than it is",
        "core/checkpoint/official/archive.py",
        "> _MAX_RATIO * packed + SPARE:",
        "> 10**6 * _MAX_RATIO * packed + SPARE:",
        "hostile/test_hostile.py::test_a_store_does_not_unpack_a_bomb",
    ),
    Breakage(
        "weights with NaN are refused",
        "core/checkpoint/weights.py",
        "if source.finite and (broken := not_finite(state, own)):",
        "if not source.finite and (broken := not_finite(state, own)):",
        "core/test_weights.py::test_weights_with_nan_or_infinity_are_refused_by_name",
    ),
    # ------------------------------------------------------------------ configs, metrics, tables
    Breakage(
        "config: an unknown argument is an error with the nearest name",
        "core/config/registry.py",
        "if name not in parameters and name not in read_around:",
        "if name not in parameters and name in read_around:",
        "core/test_weights.py::test_the_entries_of_load_from_are_checked",
    ),
    Breakage(
        "config: a value outside its range is an error",
        "core/config/kinds.py",
        "return bound.low <= value <= bound.high and",
        "return bound.low <= value and",
        "core/test_config_kinds.py::test_what_suits_a_hint",
    ),
    Breakage(
        "metrics: ignored pixels do not count",
        "core/metrics/grouping.py",
        "valid = known if valid is None else known & valid",
        "valid = known if valid is None else known | valid",
        "core/test_contingency.py::test_void_pixels_and_an_ignored_label_are_the_same",
    ),
    Breakage(
        "claims: the standard error is that of the mean",
        "core/tables/paired.py",
        "return statistics.stdev(self.differences) / math.sqrt(self.count)",
        "return statistics.stdev(self.differences) / self.count",
        "core/test_claims.py::test_paired_statistics_by_hand",
    ),
    Breakage(
        "claims: undecided as long as a seed is missing",
        "core/tables/claims.py",
        "if seeded and pairs.count < len(self.claim.seeds):",
        "if seeded and pairs.count < 1:",
        "core/test_claims.py::test_a_failed_run_leaves_its_comparisons_undecided",
    ),
    # ------------------------------------------------------------------ stvit
    Breakage(
        "stvit: tokens attend their own piece of a shifted window",
        "stvit/models/swin_block.py",
        "piece[:, :, None] == piece[:, None, :]",
        "piece[:, :, None] == piece[:, :, None]",
        "stvit/test_stvit_swin_layers.py::test_shifted_windows_never_wrap_around",
    ),
    Breakage(
        "stvit: EViT fuses what is dropped, and only that",
        "stvit/models/reducers/evit.py",
        "weights = scores.scatter(1, keep, 0.0)",
        "weights = scores",
        "stvit/test_stvit_evit.py::test_evit_equals_a_loop",
    ),
    Breakage(
        "stvit: LV-ViT adds half of the best token",
        "stvit/models/lvvit.py",
        "logits + 0.5 * tokens.amax(dim=1)",
        "logits + tokens.amax(dim=1)",
        "stvit/test_stvit_lvvit.py::test_half_of_the_best_token_counts_beside_the_class_token",
    ),
    Breakage(
        "stvit: exported graphs take another batch size",
        "stvit/models/swin_block.py",
        "b=x.shape[0] // mask.shape[0])",
        "b=int(x.shape[0]) // int(mask.shape[0]))",
        "test_model_contract.py::test_it_leaves_python_as_it_is[stvit/swin-legacy]",
    ),
    # ------------------------------------------------------------------ slot_walks
    Breakage(
        "slot_walks: only similar parts belong together",
        "slot_walks/losses/targets.py",
        "similarity.masked_fill_(similarity < threshold, _APART)",
        "similarity.masked_fill_(similarity > threshold, _APART)",
        "slot_walks/test_slot_walks_losses.py::test_what_each_target_joins",
    ),
    Breakage(
        "slot_walks: streamed gradients are those of the plain loss",
        "slot_walks/losses/streaming.py",
        "gradient = rows.div_(walk).neg_()",
        "gradient = rows.div_(walk)",
        "slot_walks/test_slot_walks_losses.py::test_streaming_equals_plain",
    ),
    Breakage(
        "slot_walks: slots compete for every token (parity)",
        "slot_walks/models/slot_attention.py",
        'rearrange(logits, "b h k n -> b (h k) n").softmax(dim=1)',
        'rearrange(logits, "b h k n -> b (h k) n").softmax(dim=2)',
        "parity/test_parity.py::test_case[slot_walks/slot_attention]",
    ),
    # ------------------------------------------------------------------ seqgan
    Breakage(
        "seqgan: an image's loss is the mean over its masked codes",
        "seqgan/losses/terms.py",
        "/ weights.sum(dim=1).clamp_min(1)).mean()",
        "/ weights.shape[1]).mean()",
        "seqgan/test_seqgan_losses.py::test_only_masked_codes_count_and_images_weigh_alike",
    ),
    Breakage(
        "seqgan: gradients pass straight through the codes",
        "seqgan/models/quantizer.py",
        "z_q = codes.detach() + (carrier - carrier.detach())",
        "z_q = codes.detach() + 0 * carrier",
        "seqgan/test_seqgan_models.py::test_gradients_stop_where_the_equation_says",
    ),
    Breakage(
        "seqgan: every step of decoding makes a code known",
        "seqgan/models/masking.py",
        "return torch.minimum(count, masked - 1).clamp_min(1)",
        "return torch.minimum(count, masked).clamp_min(1)",
        "seqgan/test_seqgan_transformers.py::test_at_least_one_code_becomes_known_in_a_step",
    ),
    # ------------------------------------------------------------------ tune_a_video
    Breakage(
        "tune_a_video: a frame attends the first and the one before",
        "tune_a_video/models/frame_attention.py",
        '"prev": max(i - 1, 0)',
        '"prev": max(i - 2, 0)',
        "tune_a_video/test_tune_a_video_models.py::test_key_frames",
    ),
    Breakage(
        "tune_a_video: inversion walks the sampler's levels (parity)",
        "tune_a_video/inference/inversion.py",
        "before = t - total // steps",
        "before = t - total // steps + 1",
        "parity/test_parity.py::test_case[tune_a_video/ddim_inversion_10]",
    ),
)


@dataclass
class Options:
    """Which breakages are tried."""

    only: list[str] = field(default_factory=list, metadata={"help": "words of names; empty: all"})
    output: str = field(default="results/breakages.json", metadata={"help": "file that is written"})


def copied(folder: Path) -> Path:
    """A copy of what git knows of this tree, as it is on disk now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["cp", "--parents", "-t", str(folder), "--", *os.fsdecode(listed).strip("\0").split("\0")], cwd=ROOT)
    return folder


def tried(tree: Path, tests: Sequence[str]) -> tuple[int, list[str], float]:
    """Runs tests of a tree in a process of their own, up to the first that fails.

    Returns:
        pytest's status, what failed, and seconds of processor time.
    """
    log = tree / "breakages.log"
    child = os.fork()
    if child == 0:
        _ask(tree, tests, log)
    _, status, usage = os.wait4(child, 0)
    lines = log.read_text().splitlines()
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 1):
        print(*lines[-30:], sep="\n", file=sys.stderr)
    return code, failed, usage.ru_utime + usage.ru_stime


def _ask(tree: Path, tests: Sequence[str], log: Path) -> NoReturn:
    """The forked child: with the libraries that are imported, and nothing of this tree."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    own = {place.name for place in tree.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    paths = [str(Path("tests", test)) for test in tests]
    options = ["-x", "-q", "-rf", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow and not processes"]
    code = pytest.main([*options, *paths])
    sys.stdout.flush()
    os._exit(int(code))


def _preload() -> None:
    """What every test imports, once."""
    for library in ("hydra.main", "mmengine.runner", "timm", "torchmetrics", "torchvision", "torch.utils.tensorboard"):
        importlib.import_module(library)


def main(argv: list[str]) -> None:
    """The command."""
    from core.config.command.cli import parse
    from core.errors import VitrineError

    options, _ = parse(argv, Options, doc=__doc__)
    chosen = [b for b in BREAKAGES if not options.only or any(word in b.name for word in options.only)]
    report: list[dict[str, Any]] = []
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder))
        status, failed, seconds = tried(tree, list(dict.fromkeys(test for b in chosen for test in b.tests)))
        if status:
            raise VitrineError(f"the tests are not green before anything is broken: {failed}")
        print(f"green before, in {seconds:.0f} s", flush=True)
        for breakage in chosen:
            file = tree / breakage.file
            whole = file.read_text()
            file.write_text(breakage.broken(whole))
            status, failed, seconds = tried(tree, breakage.tests)
            file.write_text(whole)
            # Another status than 1 says that no test was asked: the breakage is one of syntax or of imports.
            entry = {"name": breakage.name, "file": breakage.file, "old": breakage.old, "new": breakage.new}
            report.append({**entry, "red": status == 1, "failed": failed, "seconds": round(seconds, 1)})
            print(f"{'red  ' if status == 1 else 'GREEN'} {seconds:5.1f} s  {breakage.name}", flush=True)
    red = sum(entry["red"] for entry in report)
    record = {"command": "python -m tests.breakages", "red": red, "of": len(report), "breakages": report}
    if not options.only:
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")
    if red < len(report):
        raise VitrineError(f"{len(report) - red} of {len(report)} breakages go unnoticed")


if __name__ == "__main__":
    from core.config.command.cli import run

    run(main)
