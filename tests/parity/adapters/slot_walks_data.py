"""The pieces of slot_walks that hold no weights: metrics, cluster matching and picture transforms.

`slot_walks.py` runs them with its own; every number in a case's config is data.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.metrics import contingency
from core.metrics.contingency import class_iou, foreground_overlap, match_clusters, overlaps, recovered
from core.metrics.grouping import FIGURES
from slot_walks.data.transforms import CropTrain, OfficialEval, Square, bird_window

from ..cases import Case
from . import Outputs


def _labels(case: Case, slots: int, factor: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The inputs at full size, the truth and the prediction: `(B, H, W)` each."""
    block = case.config["block"]
    full = {
        name: value[:, 0].repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
        for name, value in case.inputs().items()
    }
    other = (full["gt"] * factor + 1) % slots
    prediction = torch.where(full["mix"] > case.config["mix_threshold"], full["other"], other).roll(1, dims=-1)
    return full, full["gt"], prediction


def _official_scores(case: Case) -> Outputs:
    """metrics_od, metrics_fe: the released scorers."""
    labels, slots = case.config["labels"], case.config["preds"]
    _, truth, prediction = _labels(case, slots, 1)
    table = contingency(truth, prediction, labels, slots)
    scores = {name: figure(table) for name, figure in FIGURES.items()}
    iou, dice = foreground_overlap(table)
    means = {name: scores[name].mean() for name in ("msc", "ssc", "msc_fg", "ssc_fg")}
    return {
        "ari": scores["ari"],
        "ari_fg": scores["fg_ari"],
        **means,
        "iou_per_slot": iou,
        "dice_per_slot": dice,
        "fe_iou": scores["iou"],
        "fe_dice": scores["dice"],
    }


def _scores_with_void(case: Case) -> Outputs:
    """metrics_ocl: an independent implementation that has an ignore mask."""
    labels, slots = case.config["labels"], case.config["preds"]
    full, truth, prediction = _labels(case, slots, 1)
    threshold = _threshold(case.meta["how"])
    names = {"ari": "ari", "fg_ari": "fg_ari", "mbo": "mbo", "miou_hungarian": "miou"}
    outputs = {}
    for suffix, valid in (("", None), ("_void", full["void"] <= threshold)):
        table = contingency(truth, prediction, labels, slots, valid)
        outputs |= {key + suffix: FIGURES[figure](table) for key, figure in names.items()}
        share = recovered(table, case.config["discovery_threshold"])
        outputs |= {f"recovery{suffix}": share, f"corloc{suffix}": (share > 0).double()}
    return outputs


def _threshold(how: str) -> float:
    """The bound of void pixels, which cases give in words only: `void_full > 1.2`."""
    return float(how.split("void_full > ")[1].split()[0].rstrip(".,;"))


def _clusters(case: Case) -> Outputs:
    clusters, classes = case.config["num_clusters"], case.config["num_classes"]
    factor = int(case.meta["how"].split("gt_full_before_void*")[1].split("+")[0])
    full, truth, prediction = _labels(case, clusters, factor)
    valid = full["void"] <= _threshold(case.meta["how"])
    table = contingency(prediction, truth, clusters, classes, valid).sum(dim=0)
    match = match_clusters(table)
    return {"iou_matrix": overlaps(table[None])[0], "match": match, "miou": class_iou(table, match).mean()}


def _transforms(case: Case) -> Outputs:
    how, height, width = case.meta["how"], case.config["height"], case.config["width"]
    cells = int(re.search(r"cells repeated (\d+)x", how)[1])
    crop, size = (int(n) for n in re.search(r"central (\d+) crop of the unresized.*?then (\d+)", how).groups())
    short, middle = (int(n) for n in re.search(r"shorter side (\d+) bicubic, central (\d+) crop", how).groups())
    side = int(re.search(r"both sides to (\d+)", how)[1])
    extent, bird_side = re.search(r"int\(([\d.]+)\*max\(w,h\)\).*?then (\d+)", how).groups()
    bird_above = int(re.search(r"mask>(\d+)", how)[1])
    inputs = case.inputs()
    picture, mask = (
        inputs[name].numpy().astype(np.uint8).repeat(cells, axis=0).repeat(cells, axis=1)[:height, :width]
        for name in ("image", "mask")
    )
    image = Image.fromarray(picture)
    evaluated, masks = OfficialEval(crop, size)(image, {"mask": mask})
    window = bird_window(case.config["bbox"], image.size, float(extent))
    bird, bird_masks = Square(int(bird_side))(*window.cut(image, {"mask": mask > bird_above}))
    return {
        "od_val_image": evaluated,
        "od_val_mask": masks["mask"][None],
        "coco_train": CropTrain(short, middle, crop="center", flip=0)(image),
        "fe_image": Square(side)(image),
        "bird_image": bird,
        "bird_mask": bird_masks["mask"][None],
    }


PIECES: dict[str, Callable[[Case], Outputs]] = {
    "metrics_od": _official_scores,
    "metrics_fe": _official_scores,
    "metrics_ocl": _scores_with_void,
    "semseg_hungarian": _clusters,
    "semseg_majority": _clusters,
    "transforms": _transforms,
}
