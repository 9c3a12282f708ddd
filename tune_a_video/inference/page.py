"""A page of results: source, inversion and edits side by side, all frames, scores; and the tuned weights as files."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from PIL import Image

from core.config.registry import HOOKS
from core.trainer import unwrap
from tune_a_video.data.video_io import save_video, to_pixels
from tune_a_video.inference.editing import Edits, plain_scores
from tune_a_video.inference.strips import strips
from tune_a_video.interop.pipeline import TuneAVideoPipeline
from tune_a_video.models.lora_layers import merged_copy

_STYLE = (
    "body{font-family:sans-serif;margin:2em}figure{display:inline-block;margin:.5em;vertical-align:top;width:272px}"
    "img{width:256px}figcaption{font-size:.9em}table{border-collapse:collapse}td{padding:.2em .8em}"
)
_TINY = 128


def file_name(text: str, limit: int = 60) -> str:
    """A text as part of a file's name: letters and digits, not too many."""
    return re.sub(r"[^\w]+", "-", text).strip("-")[:limit] or "clip"


def write_page(
    made: Edits, folder: Path, *, scores: Mapping[str, Any] | None = None, fps: float = 8.0, mp4: bool = True
) -> Path:
    """Writes `index.html`, `scores.json`, all videos as one picture (`strips.png`), and for every video a GIF (and MP4)
    and a folder of PNG frames.

    Args:
        made: the clip and its edits.
        folder: is made.
        scores: beside those of `plain_scores`.
        fps: of the videos.
        mp4: MP4s, too.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_video(made.grid(), folder / "side_by_side.gif", fps)
    Image.fromarray(strips(made.columns())).save(folder / "strips.png")
    figures = []
    for i, (title, video) in enumerate(made.columns()):
        stem = f"{i:02d}-{file_name(title)}"
        pixels = to_pixels(video)
        save_video(pixels, folder / f"{stem}.gif", fps)
        save_video(pixels, folder / "frames" / stem)
        if mp4:
            save_video(pixels, folder / f"{stem}.mp4", fps)
        text = f"source: {made.caption}" if title == "source" and i == 0 else title
        figures.append(
            f'<figure><img src="{stem}.gif" alt=""><figcaption>{html.escape(text)} '
            f'(<a href="frames/{stem}/">frames</a>)</figcaption></figure>'
        )
    all_scores = {"caption": made.caption, **plain_scores(made), **dict(scores or {})}
    (folder / "scores.json").write_text(json.dumps(all_scores, indent=1, default=float) + "\n")
    # Tiny pictures are shown as what they are, not smoothed.
    style = _STYLE + ("img{image-rendering:pixelated}" if made.source.shape[-1] < _TINY else "")
    page = folder / "index.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(made.caption)}</title>'
        f"<style>{style}</style><h1>{html.escape(made.caption)}</h1>{''.join(figures)}"
        f'<h2>Side by side</h2><img style="width:auto;max-width:100%" src="side_by_side.gif" alt="">'
        f"<h2>Scores</h2>{_table(all_scores)}</html>\n"
    )
    return page


def _table(scores: Mapping[str, Any]) -> str:
    rows = []
    for name, value in scores.items():
        if name == "edits":
            rows += [
                f"<tr><td>{html.escape(one['prompt'])}</td><td>change {one['change']:.2f}, flicker {one['flicker']:.2f}"
                "</td></tr>"
                for one in value
            ]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
            rows.append(f"<tr><td>{html.escape(name)}</td><td>{shown}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


@HOOKS.register_module()
class ResultsPage(Hook):
    """After training, writes the tuned tensors; after an evaluation, a page for every clip.

    `RUN/tuned.safetensors` with `tuned.json` is what `TuneAVideoUNet.load_delta` and `model.delta` take;
    `RUN/page/CLIP/index.html` is the page, written by the process that evaluated the clip.

    Args:
        pipeline: also write the whole pipeline to `RUN/pipeline`, for `TuneAVideoPipeline.from_pretrained`.
        fps: of the videos.
        mp4: MP4s beside GIFs.
    """

    priority = "LOW"
    changes_training = False

    def __init__(self, pipeline: bool = False, fps: float = 8.0, mp4: bool = True) -> None:
        self.pipeline, self.fps, self.mp4 = pipeline, fps, mp4
        self._made: list[Edits] = []

    def after_train(self, runner: Any) -> None:
        """Writes the tuned tensors."""
        trainer = unwrap(runner.model)
        about = trainer.provenance()
        if not is_main_process():
            return
        folder = Path(runner.work_dir)
        trainer.network.save_delta(folder / "tuned", steps=runner.iter, **about)
        if self.pipeline:
            network = merged_copy(trainer.network)
            TuneAVideoPipeline(**{**trainer.pipe.components, "unet": network}).save_pretrained(folder / "pipeline")

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the edits of a batch."""
        self._made += unwrap(runner.model).shown

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the edits of a batch."""
        self.after_val_iter(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the pages."""
        made, self._made = self._made, []
        names: list[str] = []
        for one in made:
            name = file_name(one.sample_id)
            names.append(name if name not in names else f"{name}-{len(names)}")
            folder = Path(runner.work_dir) / "page" / names[-1]
            page = write_page(one, folder, scores=metrics, fps=self.fps, mp4=self.mp4)
            runner.logger.info(f"page: {page}")

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Writes the pages."""
        self.after_val_epoch(runner, metrics)
