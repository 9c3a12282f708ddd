"""Scores of edited videos: consistency and agreement with the text by CLIP, PickScore, and the drawn world's readings.

Functions take embeddings and know no model. Metrics (torchmetrics) take videos `(b, 3, f, H, W)` in [0, 1], as the
pipeline returns them. Evaluators (mmengine) read what a trainer's `predict` returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from core.config.registry import METRICS
from core.errors import ConfigError, nearest
from core.metrics import TorchMetrics
from tune_a_video.metrics.clip_model import TransformersCLIP, load_clip
from tune_a_video.metrics.means import Means, check_videos
from tune_a_video.metrics.outside import OutsideScores
from tune_a_video.metrics.warp import WarpError

__all__ = [
    "ClipScores",
    "DrawnScores",
    "EditQuality",
    "FrameAccuracy",
    "FrameConsistency",
    "OutsideScores",
    "PickScore",
    "TextAlignment",
    "WarpError",
    "consecutive_consistency",
    "directional_similarity",
    "frame_accuracy",
    "frame_consistency",
    "text_alignment",
]


# ---------------------------------------------------------------------- functions of embeddings
def frame_consistency(frames: Tensor) -> Tensor:
    """Mean cosine over all ordered pairs of different frames (section 6 of the recipe).

    Args:
        frames: embeddings (f, d), of any length.

    Returns:
        A scalar, -1 to 1; papers print 100 times that.

    Raises:
        ValueError: less than two frames.
    """
    count = _several(frames, "frame_consistency")
    unit = F.normalize(frames, dim=1)
    # The sum over all pairs is the squared length of the sum; without each frame's pair with itself.
    return (unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1))


def consecutive_consistency(frames: Tensor) -> Tensor:
    """Mean cosine of neighbouring frames: what FateZero and others call temporal consistency.

    Args:
        frames: embeddings (f, d).

    Raises:
        ValueError: less than two frames.
    """
    _several(frames, "consecutive_consistency")
    return F.cosine_similarity(frames[1:], frames[:-1], dim=1).mean()


def text_alignment(frames: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
    """Mean over frames of exp(logit_scale) x cosine with the text; not cut off at 0. PickScore is the same formula.

    Args:
        frames: embeddings (f, d).
        text: embedding (d,) or (1, d).
        logit_scale: of the model; ln 100 in OpenAI's CLIP.
    """
    return torch.as_tensor(logit_scale).exp() * _cosines(frames, text).mean()


def frame_accuracy(frames: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Share of frames that resemble the target text at least as much as the source text (FateZero).

    Args:
        frames: embeddings (f, d).
        target: embedding of the edited caption, (d,) or (1, d).
        source: embedding of the source's caption.
    """
    return (_cosines(frames, target) >= _cosines(frames, source)).float().mean()


def directional_similarity(frames: Tensor, before: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Mean cosine of what an edit changes in the frames and what it changes in the text (Gal et al. 2021).

    All embeddings have unit length before they are subtracted.

    Args:
        frames: embeddings of the edited frames (f, d).
        before: of the source's frames, (f, d).
        target: embedding of the edited caption, (d,) or (1, d).
        source: embedding of the source's caption.
    """
    change = F.normalize(frames, dim=1) - F.normalize(before, dim=1)
    return _cosines(change, F.normalize(target.flatten(), dim=0) - F.normalize(source.flatten(), dim=0)).mean()


def _cosines(frames: Tensor, text: Tensor) -> Tensor:
    return F.cosine_similarity(frames, text.reshape(1, -1), dim=1)


def _several(frames: Tensor, name: str) -> int:
    if frames.ndim != 2 or len(frames) < 2:
        raise ValueError(f"{name}: embeddings are {tuple(frames.shape)}: (f, d) with two frames or more")
    return len(frames)


# ---------------------------------------------------------------------- metrics of videos
# From embeddings of the frames, of the text, of the source's text and of the source's frames, and the logit scale.
_Read = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor], Tensor]

_FIGURES: dict[str, _Read] = {
    "frame_consistency": lambda frames, text, source, before, scale: 100 * frame_consistency(frames),
    "text_alignment": lambda frames, text, source, before, scale: text_alignment(frames, text, scale),
    "consecutive_consistency": lambda frames, text, source, before, scale: consecutive_consistency(frames),
    "frame_accuracy": lambda frames, text, source, before, scale: frame_accuracy(frames, text, source),
    "directional_similarity": lambda frames, text, source, before, scale: directional_similarity(
        frames, before, text, source
    ),
}
_NEED_SOURCE = ("frame_accuracy", "directional_similarity")
_NEED_TEXT = ("text_alignment", *_NEED_SOURCE)


class ClipScores(Means):
    """Figures that come from CLIP, with one pass over the frames: a dictionary of means over (video, prompt) pairs.

    `frame_consistency` (times 100), `text_alignment`, `consecutive_consistency` (a cosine), `frame_accuracy` (a share),
    `directional_similarity` (a cosine).

    Args:
        clip: folder of a model (see `tune_a_video.metrics.clip_model.load_clip`), or an embedder.
        figures: which of them.

    Raises:
        ConfigError: unknown figure, or none.
        MissingDataError: no CLIP in the folder.
    """

    def __init__(
        self,
        clip: str | os.PathLike | nn.Module,
        figures: Sequence[str] = ("frame_consistency", "text_alignment"),
        **options: Any,
    ) -> None:
        unknown = [name for name in figures if name not in _FIGURES]
        if unknown or not figures:
            wrong = f"'{unknown[0]}'{nearest(unknown[0], list(_FIGURES))}" if unknown else "none"
            raise ConfigError(f"figures: {wrong}; there are {', '.join(_FIGURES)}")
        super().__init__(figures, **options)
        self.clip = clip if isinstance(clip, nn.Module) else load_clip(clip)

    def update(
        self,
        videos: Tensor,
        prompts: Sequence[str] | None = None,
        source_prompts: Sequence[str] | None = None,
        sources: Tensor | None = None,
    ) -> None:
        """Takes videos.

        Args:
            videos: (b, 3, f, H, W) in [0, 1].
            prompts: what they should show, for `text_alignment`, `frame_accuracy` and `directional_similarity`.
            source_prompts: what their sources show, for the last two.
            sources: the sources, of the same shape, for `directional_similarity`.

        Raises:
            ValueError: another shape, or prompts or sources that are missing or of another number.
        """
        check_videos(videos)
        text = self._texts(prompts, "prompts", len(videos), _NEED_TEXT)
        source = self._texts(source_prompts, "source_prompts", len(videos), _NEED_SOURCE)
        directed = "directional_similarity" in self.figures
        if directed and (sources is None or sources.shape != videos.shape):
            raise ValueError(f"directional_similarity needs sources of the videos' shape {tuple(videos.shape)}")
        for i, video in enumerate(videos):
            frames = self.clip.encode_frames(video.transpose(0, 1)).float()
            before = self.clip.encode_frames(sources[i].transpose(0, 1)).float() if directed else None
            one, other = (None if t is None else t[i].float() for t in (text, source))
            given = frames, one, other, before, self.clip.logit_scale
            self.add({name: _FIGURES[name](*given) for name in self.figures})

    def _texts(self, prompts: Sequence[str] | None, what: str, count: int, users: Sequence[str]) -> Tensor | None:
        needed = [name for name in self.figures if name in users]
        if not needed:
            return None
        if prompts is None or isinstance(prompts, str) or len(prompts) != count:
            raise ValueError(f"{needed[0]} needs {what}: a list of {count} texts, one for each video")
        return self.clip.encode_text(list(prompts))


class _OneFigure(ClipScores):
    """One figure as a number."""

    def compute(self) -> Tensor:
        """The mean over videos."""
        return super().compute()[self.figures[0]]


class FrameConsistency(_OneFigure):
    """100 x the mean cosine of all pairs of frames. `update(videos)`; see `ClipScores`."""

    higher_is_better = True

    def __init__(self, clip: str | os.PathLike | nn.Module, consecutive: bool = False, **options: Any) -> None:
        super().__init__(clip, ("consecutive_consistency" if consecutive else "frame_consistency",), **options)


class TextAlignment(_OneFigure):
    """CLIP score, mean over frames. `update(videos, prompts)`; see `ClipScores`."""

    higher_is_better = True

    def __init__(self, clip: str | os.PathLike | nn.Module, **options: Any) -> None:
        super().__init__(clip, ("text_alignment",), **options)


class FrameAccuracy(_OneFigure):
    """Share of frames nearer to the edit than to the source. `update(videos, prompts, source_prompts)`."""

    higher_is_better = True

    def __init__(self, clip: str | os.PathLike | nn.Module, **options: Any) -> None:
        super().__init__(clip, ("frame_accuracy",), **options)


class PickScore(TextAlignment):
    """PickScore, mean over frames. `update(videos, prompts)`.

    Args:
        folder: local copy of yuvalkirstain/PickScore_v1 with the processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        size: frames are resized to this square first, as the benchmark does; None: they are not.
    """

    def __init__(self, folder: str | os.PathLike, size: int | None = 480, **options: Any) -> None:
        super().__init__(TransformersCLIP(folder, size=size), **options)


class DrawnScores(Means):
    """Readings of edited clips of the drawn world: means of those of `tune_a_video.standin.Reading` and `Motion`.

    Where only some frames started from noise, also `path_new`: the path of those alone.

    Args:
        folder: the stand-in (`tools/prepare_data.py task=tiny_sd`), for its judge.
    """

    def __init__(self, folder: str | os.PathLike, **options: Any) -> None:
        from tune_a_video.standin import Motion, Reading, load_judge

        super().__init__((*Reading._fields, *Motion._fields, "path_new"), **options)
        self.judge = load_judge(folder)

    def update(self, videos: Tensor, centres: Tensor, prompts: Sequence[str], from_noise: Tensor | None = None) -> None:
        """Takes videos.

        Args:
            videos: (b, 3, f, 16, 16) in [0, 1].
            centres: of the sources' objects, (b, f, 2) in pixels.
            prompts: captions of the drawn world, one for each.
            from_noise: frames that did not start from the source, (b, f) bool; None: not known.

        Raises:
            ValueError: shapes or numbers do not fit, or a prompt is no caption of that world.
        """
        from tune_a_video.standin import measure, motion, parse_caption, path_distances

        check_videos(videos)
        new = torch.zeros(centres.shape[:2], dtype=torch.bool) if from_noise is None else from_noise
        for video, path, prompt, mask in zip(videos.float(), centres, prompts, new.to(centres.device), strict=True):
            frames = 2 * video.transpose(0, 1) - 1
            values = measure(frames, path, parse_caption(prompt), self.judge)._asdict()
            if len(frames) > 1:
                values |= motion(frames, path)._asdict()
            if mask.any() and not mask.all():
                values["path_new"] = path_distances(frames[mask], path[mask]).mean()
            self.add(values)


# ---------------------------------------------------------------------- evaluator
@METRICS.register_module()
class EditQuality(TorchMetrics):
    """Scores the edits that `TuneAVideoTrainer.predict` returns; each edit of each clip counts once.

    Reads `video` and `source` `(R, 3, f, H, W)` in [0, 1], texts `prompt` and `source_prompt`, and of the drawn world
    `centres` `(R, f, 2)` and `from_noise` `(R, f)`.

    Gives the figures of `ClipScores`, and `pick_score`, `warp_error` (under the source's motion), `outside_psnr` and
    `outside_lpips` (of clips with a `mask` `(R, f, H, W)` of what is edited), and the drawn world's `path`, `words`,
    `agree`, `agree_right`, `joint`, `jitter`, `motion_cosine`, `speed_error` (and `path_new`): those for which a file
    or folder is given.

    Args:
        clip: folder of a CLIP, or of the stand-in.
        figures: of `ClipScores`.
        pick_score: folder of PickScore.
        raft: file of RAFT's weights.
        drawn: folder of the stand-in, for clips of the drawn world (the data set gives `centres`).
        outside: whether to score what lies outside the masks.
        lpips: file of AlexNet's weights, for `outside_lpips`.
        prefix: in front of all names.

    Raises:
        ConfigError: nothing to evaluate with.
    """

    def __init__(
        self,
        clip: str | os.PathLike | None = None,
        figures: Sequence[str] = ("frame_consistency", "text_alignment"),
        pick_score: str | os.PathLike | None = None,
        raft: str | os.PathLike | None = None,
        drawn: str | os.PathLike | None = None,
        prefix: str = "",
        outside: bool = False,
        lpips: str | os.PathLike | None = None,
    ) -> None:
        metrics: dict[str, Metric] = {}
        inputs: dict[str, list[str]] = {}
        if clip is not None:
            metrics["clip"], inputs["clip"] = ClipScores(clip, figures), ["video", "prompt", "source_prompt"]
            inputs["clip"] += ["source"] if "directional_similarity" in figures else []
        if pick_score is not None:
            metrics["pick_score"], inputs["pick_score"] = PickScore(pick_score), ["video", "prompt"]
        if raft is not None:
            metrics["warp_error"], inputs["warp_error"] = WarpError(raft), ["video", "source"]
        if drawn is not None:
            metrics["drawn"] = DrawnScores(drawn)
            inputs["drawn"] = ["video", "centres", "prompt", "from_noise"]
        if outside or lpips is not None:
            metrics["outside"], inputs["outside"] = OutsideScores(lpips), ["video", "source", "mask"]
        if not metrics:
            raise ConfigError(
                "EditQuality: give clip=, pick_score=, raft= or drawn=, a file or folder, or outside=true"
            )
        # A clip with several edits gives several samples.
        super().__init__(metrics, inputs=inputs, names={}, prefix=prefix, check_size=False)
