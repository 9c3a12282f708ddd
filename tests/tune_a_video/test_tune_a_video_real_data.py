"""Every experiment on real data takes two steps on small files in its own format, over a random base of diffusers."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import compose
from core.engine.launch import run
from core.output.media import write_media
from tune_a_video.data.tgve import GROUPS

HEAD = ("Video name", "Our GT caption", "Style Change Caption", "Object Change Caption")
HEAD = (*HEAD, "Background Change Caption", "Multiple Changes Caption")
FILMS = ["car_turn", "man_skiing", "man_surfing", "rabbit_watermelon", "edit"]


def pixels(count=6, size=(24, 40)):
    """Noise in large cells, which survives the compression of videos."""
    cells = np.random.default_rng(0).integers(0, 256, (count, size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return cells.repeat(8, axis=1).repeat(8, axis=2)


def film(folder):
    """`path`: an MP4 as the released clips are."""
    return [f"train_dataloader.dataset.path={write_media(pixels(), folder / 'clip', video='mp4')}"]


def frames(folder, size):
    folder.mkdir(parents=True)
    for i, frame in enumerate(pixels(size=size)):
        Image.fromarray(frame).save(folder / f"{i:05d}.jpg")


def davis(folder):
    """`JPEGImages/480p/CLIP/00000.jpg`, the list of a split, and captions as a text file."""
    frames(folder / "JPEGImages/480p/car-turn", (24, 40))
    frames(folder / "JPEGImages/480p/bear", (24, 40))
    (folder / "ImageSets/2017").mkdir(parents=True)
    (folder / "ImageSets/2017/val.txt").write_text("car-turn\n")
    (folder / "captions.txt").write_text("car-turn a jeep car is moving on the road\n")
    given = {"root": folder, "captions": folder / "captions.txt", "split": "val"}
    return [*(f"train_dataloader.dataset.{name}={value}" for name, value in given.items()), "model.prompts=['snow']"]


def tgve(folder):
    """Groups of clips and the table of captions and edits, with a heading between the groups."""
    frames(folder / GROUPS[0] / "480p_frames/gold-fish", (16, 16))
    rows = [
        HEAD,
        ["DAVIS Videos", *[""] * 5],
        ["gold-fish", "a fish swims", "a drawn fish", "a shark", "", "a red shark"],
    ]
    with (folder / "LOVEU-TGVE-2023_Dataset.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    given = [f"custom_hooks.submission.root={folder / 'submission'}", "train_dataloader.dataset.size=16"]
    return [f"train_dataloader.dataset.root={folder}", *given]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "prepare"), [*((name, film) for name in FILMS), ("davis", davis), ("loveu_tgve", tgve)]
)
def test_two_steps_of_every_experiment(name, prepare, sd_folder, tmp_path):
    given = prepare(tmp_path / "data")
    wide = [] if name == "loveu_tgve" else ["model.n_frames=3", "train_dataloader.dataset.size=16"]
    wide += ["model.prompts=['a fox']", "train_dataloader.dataset.prompt=a dog"] if name == "edit" else []
    folder = tmp_path / "run"
    result = run(
        compose(
            [
                *(f"experiment=tune_a_video/{name}", "runtime=cpu", f"run_dir={folder}", f"model.base={sd_folder}"),
                *("train_cfg.max_steps=2", "log_every=1", "model.sample.steps=1", f"runs_dir={tmp_path / 'runs'}"),
                *("+train_dataloader.num_workers=0", "+test_dataloader.num_workers=0", *wide, *given),
            ]
        )
    )
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
    assert result["metrics"] and all(np.isfinite(value) for value in result["metrics"].values())
    about = json.loads((folder / "tuned.json").read_text())
    assert about["frames"] == [6 if name == "loveu_tgve" else 3] and all(about["caption"])
    pages = list((folder / "page").glob("**/index.html"))
    assert len(pages) == 1
    if name == "loveu_tgve":
        root = tmp_path / "data/submission"
        written = sorted(path.relative_to(root) for path in root.glob("*/*/*/*"))
        assert [path.name for path in written] == ["multiple", "object", "style"]
        assert {path.parent.as_posix() for path in written} == {f"vitrine/{GROUPS[0]}/gold-fish"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_draws_every_second_row_of_the_joint_batch(sd_folder, monkeypatch, rank):
    """Noise, timesteps, dropped captions and draws of the posterior: what the network sees of a process's clips."""
    from tune_a_video.trainer.tuning import TuneAVideoTrainer

    video = torch.rand(6, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    joint = {"video": video, "caption": [f"clip {i}" for i in range(6)], "sample_id": [str(i) for i in range(6)]}
    own = {name: value[rank::2] for name, value in joint.items()}
    made = TuneAVideoTrainer(str(sd_folder), caption_dropout=0.5).train()
    seen = []
    forward = made.network.forward

    def record(noisy, times, encoder_hidden_states, **options):
        seen.append((noisy, times, encoder_hidden_states))
        return forward(noisy, times, encoder_hidden_states, **options)

    monkeypatch.setattr(made.network, "forward", record)
    for batch, world in ((joint, (0, 1)), (own, (rank, 2))):
        monkeypatch.setattr("core.engine.state.randomness.get_dist_info", lambda world=world: world)
        torch.manual_seed(3)
        made.losses(batch)
    for whole, part in zip(*seen, strict=True):
        torch.testing.assert_close(part, whole[rank::2])
    texts = seen[0][2]
    dropped = [torch.equal(text, made._empty()[0]) for text in texts]
    assert 0 < sum(dropped) < 6 and len(set(seen[0][1].tolist())) > 3
