"""Pictures of slots and walks show what they say, and curves are those of the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import ConfigError
from slot_walks import SlotEncoder, SlotWalker, WalkLoss, affinity_target, segments, transitions
from slot_walks.inference.curves import CURVES, draw, main, read_log, read_runs, series
from slot_walks.inference.drawing import (
    Panel,
    at_size,
    borders,
    enlarge,
    mark_patch,
    matrix,
    paint_heat,
    paint_mask,
    paint_segments,
    scenes,
    sheet,
    slot_colours,
    soft_masks,
    walk_picture,
)
from slot_walks.inference.files import Walks, choose_patch, scenes_picture, winners

ROOT = Path(__file__).resolve().parents[2]


def grey(height: int, width: int, value: int = 120) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


# ---------------------------------------------------------------------- drawing
def test_colours_differ_and_stay_with_their_slot() -> None:
    colours = slot_colours(24).astype(int)
    assert np.array_equal(slot_colours(5), colours[:5])
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(24, dtype=int)
    assert apart.min() > 40 and apart[:12, :12].min() > 90


def test_segments_have_their_colours_and_a_line_between_them() -> None:
    labels = np.zeros((40, 60), int)
    labels[:, 30:] = 2
    painted = paint_segments(grey(40, 60), labels)
    for column, slot in ((10, 0), (50, 2)):
        assert np.array_equal(painted[20, column], np.round(0.4 * 120 + 0.6 * slot_colours(3)[slot]).astype(np.uint8))
    assert (painted[:, 29:31] == 255).all(axis=2).any(axis=1).all() and not (painted[:, 35:] == 255).all(axis=2).any()
    plain = paint_segments(grey(40, 60), labels, plain=0)
    assert np.ptp(plain[20, 10]) == 0 and np.ptp(plain[20, 50]) > 50
    with pytest.raises(ValueError, match="do not fit"):
        paint_segments(grey(40, 61), labels)
    with pytest.raises(ValueError, match="no colour"):
        paint_segments(grey(40, 60), labels, slot_colours(2))


def test_borders_are_between_segments_only() -> None:
    labels = np.zeros((9, 9), int)
    assert not borders(labels).any()
    labels[3:6, 3:6] = 7
    edge = borders(labels, 2)
    assert edge[3, 4] and edge[2, 4] and not edge[4, 4] and not edge[0].any()


def test_heat_is_where_the_probability_is_and_the_patch_is_framed() -> None:
    values = np.zeros((3, 4))
    values[1, 2] = 0.5
    picture = paint_heat(grey(30, 40), values)
    assert picture[15, 25].sum() > 600 and picture[5, 5].sum() < 250
    dimmer = paint_heat(grey(30, 40), values, top=2.0)
    assert dimmer[15, 25].sum() < picture[15, 25].sum(), "top sets the scale"
    framed = paint_heat(grey(30, 40), values, patch=(2, 3))
    changed = np.abs(framed.astype(int) - picture).sum(axis=2) > 0
    rows, columns = np.nonzero(changed)
    assert rows.min() == 16 and columns.min() == 26 and not changed[21:29, 31:39].any()
    with pytest.raises(ValueError, match="not on a grid of 3 x 4"):
        mark_patch(grey(30, 40), (3, 0), (3, 4))


def test_a_mask_shows_the_picture_where_it_is_high() -> None:
    mask = np.zeros((8, 8))
    mask[:, :4] = 1
    painted = paint_mask(grey(8, 8, 200), mask, (255, 0, 0))
    assert (painted[:, :4] == 200).all() and (painted[:, 4:, 0] > painted[:, 4:, 1]).all() and painted[:, 4:].max() < 90


@pytest.mark.parametrize("count", [1, 2, 24])
def test_a_matrix_is_dark_on_its_large_entries(count: int) -> None:
    picture = matrix(np.eye(count))
    assert picture.shape == (256, 256, 3)
    # Entry (0, K-1) is the upper right one, (K-1, K-1) the lower right one; corners of entries hold no digits.
    side, origin, down = 0.87 * 256 / count, 0.11 * 256, 0.11 * 256
    right = int(origin + (count - 0.85) * side)
    assert picture[int(down + (count - 0.85) * side), right].mean() < 60
    if count > 1:
        assert picture[int(down + 0.15 * side), right].mean() > 200


def test_sheets_keep_the_panels_and_name_the_rows() -> None:
    red = np.zeros((10, 20, 3), np.uint8)
    red[..., 0] = 255
    picture = sheet(
        [[Panel(red, "one"), Panel(grey(10, 5))], [Panel(grey(20, 20))]], ["first", "second\nrow"], height=50
    )
    assert (picture == (255, 0, 0)).all(axis=2).sum() == 50 * 100
    assert (picture == 120).all(axis=2).sum() >= 50 * 25 + 50 * 50
    plain = sheet([[Panel(red)]], height=50)
    assert plain.shape[0] == 6 + 56 and plain.shape[1] == 6 + 106
    with pytest.raises(ValueError, match="2 rows are named"):
        scenes([[red, red, red]], ["a", "b"])
    masks = np.random.default_rng(0).random((11, 12, 16))
    assert soft_masks(grey(12, 16), masks).shape[0] > 2 * 256, "eight slots a row at most"


def test_sizes_for_drawing_keep_the_aspect() -> None:
    assert at_size(grey(64, 32)).shape == (256, 128, 3)
    assert at_size(grey(300, 400)).shape == (300, 400, 3)
    assert at_size(grey(1000, 2000)).shape == (320, 640, 3)
    assert at_size(grey(1, 5000)).shape == (1, 640, 3)
    assert enlarge(np.arange(4).reshape(2, 2), (4, 6))[3].tolist() == [2, 2, 2, 3, 3, 3]


def test_a_walk_picture_changes_with_the_walk() -> None:
    generator = np.random.default_rng(0)
    walk, target = (generator.dirichlet(np.ones(12)).reshape(3, 4) for _ in range(2))
    shown = (walk, target, np.eye(3), (1, 2))
    picture = walk_picture(grey(30, 40), *shown)
    for place, other in enumerate((walk[::-1], target[::-1], np.eye(3)[::-1], (0, 0))):
        changed = walk_picture(grey(30, 40), *shown[:place], other, *shown[place + 1 :])
        assert changed.shape == picture.shape and np.abs(changed.astype(int) - picture).mean() > 0.5, place
    wide = walk_picture(grey(100, 300), walk, target, np.eye(3), (1, 2))
    assert wide.shape[1] < 1650 and wide.shape[0] > 2 * 256, "panels of wide pictures lie in two rows"


# ---------------------------------------------------------------------- what is drawn
def output_of(height: int, width: int, slots: int = 3, dim: int = 8) -> tuple[object, torch.Tensor]:
    torch.manual_seed(0)
    network = SlotWalker(None, SlotEncoder(dim, dim, slots, init="learned"), feature_grid=(height, width)).eval()
    with torch.no_grad():
        output = network(features=torch.randn(2, height * width, dim), grid=(height, width))
    return output, transitions(output.features, output.whole)[0]


@pytest.mark.parametrize("kind", ["thresholded", "dense", "identity", "topk", "attention"])
def test_rows_are_those_of_the_whole_matrices(kind: str) -> None:
    output, _ = output_of(3, 5)
    loss = WalkLoss(target=kind, threshold=0.2)
    to_slot, to_part = transitions(output.features, output.whole)
    walks = Walks(output, 1, loss)
    assert torch.allclose(walks.row((2, 1)).flatten(), (to_slot @ to_part)[1, 11], atol=1e-6)
    assert torch.allclose(walks.whole(), (to_part @ to_slot)[1], atol=1e-6)
    target = walks.target((2, 1))
    assert target.shape == (3, 5) and torch.allclose(target.sum(), torch.tensor(1.0))
    if kind == "thresholded":
        assert torch.allclose(target.flatten(), affinity_target(output.features, threshold=0.2)[1, 11], atol=1e-6)
    if kind == "identity":
        assert target[2, 1] == 1
    with pytest.raises(ValueError, match="different widths"):
        Walks(output._replace(whole=None), 0, loss)


def test_positions_in_the_target_are_shown() -> None:
    output, _ = output_of(4, 4)
    plain, near = (Walks(output, 0, WalkLoss(target_position=p)).target((1, 1)) for p in ("none", "average"))
    assert near[1, 2] > plain[1, 2] or near[2, 1] > plain[2, 1]
    assert not torch.allclose(plain, near)


def test_the_patch_is_the_surest_outside_the_largest_segment() -> None:
    #                               0: large segment and sure          1           2: surest of the others
    assignment = torch.tensor([[0.99, 0, 0.01]] * 4 + [[0.3, 0.7, 0]] * 2 + [[0.1, 0.1, 0.8], [0.2, 0.1, 0.7]])
    assert choose_patch(assignment, (2, 4)) == (1, 2)
    assert choose_patch(assignment[:4], (2, 2)) == (0, 0), "one slot has everything"
    assert choose_patch(assignment, (2, 4), (0.0, 0.0)) == (0, 0)
    assert choose_patch(assignment, (2, 4), (1.0, 1.0)) == (1, 3)
    assert choose_patch(assignment, (2, 4), (0.49, 0.51)) == (0, 2)


def test_winners_are_segments() -> None:
    _, assignment = output_of(3, 5, slots=7)
    expected = segments(assignment, (3, 5), (31, 44))
    for index in range(2):
        assert np.array_equal(winners(assignment[index], (3, 5), (31, 44)), expected[index].numpy())


def test_truth_has_the_colours_of_its_slots() -> None:
    output, _ = output_of(4, 4, slots=3)
    assignment = torch.zeros(2, 16, 3)
    assignment[:, :8, 1] = assignment[:, 8:, 2] = 1
    mask = torch.zeros(2, 32, 32, dtype=torch.long)
    mask[:, 2:12, 4:28] = 9  # inside slot 1
    mask[:, 20:30, 4:28] = 255  # not known
    pictures = scenes_picture({"image": torch.rand(2, 3, 32, 32), "mask": mask}, output, assignment, WalkLoss())
    # Rows of 192 pixels with 6 between them; the first column begins behind the names.
    left = next(x for x in range(pictures.shape[1]) if (pictures[10:190, x] != 255).any(axis=1).mean() > 0.9)
    row = pictures[6 + 2 * 198 : 6 + 2 * 198 + 192, left : left + 192].astype(int)
    inside, unknown, outside = row[40, 96], row[150, 96], row[100, 10]
    assert inside[2] - inside[0] > 60, "slot 1 is blue"
    assert np.ptp(unknown) < 30 and np.ptp(outside) < 30
    without = scenes_picture({"image": torch.rand(2, 3, 32, 32)}, output, assignment, WalkLoss())
    assert without.shape[0] == pictures.shape[0] - 198
    silent = scenes_picture({"image": torch.rand(2, 3, 32, 32)}, output._replace(whole=None), assignment, WalkLoss())
    assert silent.shape[0] == pictures.shape[0] - 3 * 198, "no walk between slots and features of other widths"


# ---------------------------------------------------------------------- curves
def write_log(folder: Path, steps: int = 20, evaluations: int = 2) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {
            "step": s,
            "epoch": 1,
            "time": 0.0,
            "loss_wpw": 1 / s,
            "loss_pwp": 2 / s,
            "pwp_kl": None if s == 3 else 1.0,
            "lr": 1,
        }
        for s in range(1, steps + 1)
    ]
    lines += [{"step": steps, "time": 1.0, "val/mbo_i": 0.1 * e, "val/mbo_i_std": 0.0} for e in range(evaluations)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "loss_w')
    return folder


def test_series_are_the_figures_of_the_log(tmp_path: Path) -> None:
    found = series(read_log(write_log(tmp_path / "a")))
    assert set(found) == {"loss_wpw", "loss_pwp", "pwp_kl", "val/mbo_i"}
    assert found["loss_wpw"] == (list(range(1, 21)), [1 / s for s in range(1, 21)])
    assert 3 not in found["pwp_kl"][0] and len(found["pwp_kl"][0]) == 19


def test_the_command_draws_one_or_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_log(tmp_path / "runs" / "older")
    write_log(tmp_path / "runs" / "newer", steps=5, evaluations=1)
    assert read_log(tmp_path / "runs")[-1]["step"] == 20, "of a folder of runs the last in order"
    main(
        [f"run={tmp_path / 'runs' / 'older'},{tmp_path / 'runs' / 'newer'}", f"output={tmp_path / 'deep' / 'two.png'}"]
    )
    main([f"run={tmp_path / 'runs' / 'older'}", f"output={tmp_path / 'one.png'}"])
    assert "two.png" in capsys.readouterr().out
    with Image.open(tmp_path / "deep" / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.size[0] == one.size[0] and np.asarray(two).std() > 10
        # matplotlib's first two colours
        for picture, orange in ((one, False), (two, True)):
            pixels = np.asarray(picture).astype(int)
            assert (np.abs(pixels - (31, 119, 180)).sum(axis=2) < 10).any()
            assert (np.abs(pixels - (255, 127, 14)).sum(axis=2) < 10).any() == orange


def test_kept_curves_are_drawn_as_the_runs_are(tmp_path: Path) -> None:
    """Seeds of one experiment share a colour; the file holds the chosen figures and nothing else."""
    for seed, steps in ((11, 20), (12, 20), (11, 5)):
        folder = write_log(tmp_path / f"{seed}-{steps}", steps=steps)
        (folder / "config.yaml").write_text(f"name: slot_walks/x\nseed: {seed}\ntrain_cfg: {{max_steps: {steps}}}\n")
    folders = ",".join(str(tmp_path / name) for name in ("11-20", "12-20", "11-5"))
    figures = "figures=loss_wpw,val/mbo_i"
    main([f"run={folders}", figures, f"output={tmp_path / 'first.png'}", f"keep={tmp_path / 'kept.json'}"])
    main([f"run={tmp_path / 'kept.json'}", figures, f"output={tmp_path / 'again.png'}"])
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    kept = json.loads((tmp_path / "kept.json").read_text())["runs"]
    names = [f"slot_walks/x, {steps} steps, seed {seed}" for seed, steps in ((11, 20), (12, 20), (11, 5))]
    assert list(kept) == names
    assert {key for records in kept.values() for record in records for key in record} == {
        "step",
        "loss_wpw",
        "val/mbo_i",
    }
    assert kept[names[0]][2] == {"step": 3, "loss_wpw": 0.33333}
    with Image.open(tmp_path / "first.png") as picture:
        pixels = np.asarray(picture).astype(int)
    for colour, there in (((31, 119, 180), True), ((255, 127, 14), True), ((44, 160, 44), False)):
        assert (np.abs(pixels - colour).sum(axis=2) < 10).any() == there


def test_losses_that_fall_far_have_a_logarithmic_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    scales = []
    real = Axes.set_yscale
    monkeypatch.setattr(Axes, "set_yscale", lambda self, scale: (scales.append(scale), real(self, scale)))
    for last, expected in ((0.05, ["log"]), (0.5, []), (0.0, []), (-1.0, [])):
        scales.clear()
        draw({"run": [{"step": 1, "loss_wpw": 1.0, "val/ari": 1.0}, {"step": 2, "loss_wpw": last, "val/ari": 0.01}]})
        assert scales == expected, last


def test_what_cannot_be_kept_or_read_back_is_named(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"names runs by their config\.yaml"):
        read_runs([str(folder)], keep=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="not the config of a run"):
        read_runs([str(folder)], keep=True)
    (tmp_path / "x.json").write_text('{"runs": [1]}')
    with pytest.raises(ConfigError, match="holds no curves"):
        read_runs([str(tmp_path / "x.json")])


def test_logs_without_figures_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no log\.jsonl"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no records"):
        read_log(tmp_path)
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw({"run": [{"step": 1, "loss": 1.0}]})


@pytest.mark.child
def test_help_is_quick_to_load() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "slot_walks.inference.curves", "--help"]
    wide = {**os.environ, "COLUMNS": "200"}  # a narrow terminal folds the command
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, env=wide)
    assert done.returncode == 0 and "python -m slot_walks.inference.curves run=" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert not imported & {"torch", "matplotlib", "numpy"}
    assert "loss_wpw" in CURVES
