"""mmdet's detectors in this engine: which parts are compiled, what mixed precision leaves alone, what tools ask.

A detector is configured as in mmdet (``model: {type: mmdet.MaskRCNN, ...}``) and trained as it is; the Runner treats it
like any mmengine model. `Detector` shows it to the tools (inference, profiling) the way a trainer shows itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config.files import check_records, read_json
from core.engine.keys import eval_sets
from core.errors import ConfigError
from core.trainer import Batch, Inference, Trainer

#: Side that a small picture is enlarged to, so that boxes and names can be read.
_LEGIBLE = 480


# ---------------------------------------------------------------------- in the Runner
def networks(model: nn.Module) -> dict[str, nn.Module]:
    """What is worth compiling: a trainer's networks, or a detector's backbone and neck (heads are Python through and
    through), or the whole model.
    """
    if isinstance(model, Trainer):
        return model.networks()
    parts = {name: getattr(model, name) for name in ("backbone", "neck") if hasattr(model, name)}
    return parts or {"model": model}


def keep_boxes_exact(model: nn.Module) -> None:
    """Keeps box arithmetic in float32 under autocast; nothing happens to models without mmdet's heads.

    mmdet casts boxes to the type of the features before it pools them. A bfloat16 has 8 bits, so that a corner beyond
    512 pixels would be rounded to multiples of 4. Features are cast to float32 on their way into RoI pooling instead,
    and so are the scores and offsets that heads predict, of which boxes are decoded, sorted and compared.
    """
    if "mmdet.models" not in sys.modules:
        return
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor

    for module in model.modules():
        if isinstance(module, BaseRoIExtractor):
            module.register_forward_pre_hook(lambda _, inputs: _float(inputs))
        elif isinstance(module, BaseDenseHead | BBoxHead | FCNMaskHead):
            module.register_forward_hook(lambda _, inputs, outputs: _float(outputs))


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return type(value)(map(_float, value)) if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------- for the tools
@contextmanager
def constructing(model: Any, device: torch.device | str) -> Iterator[None]:
    """What is built inside lies on `device`.

    mmdet's constructors compute with small tensors, which "meta" ones refuse: there only parameters become "meta".

    Args:
        model: the class that is built.
        device: see `torch.device`.
    """
    mmdet = any(base.__module__.startswith("mmdet.") for base in getattr(model, "__mro__", ()))
    if str(device) != "meta" or not mmdet:
        with torch.device(device):
            yield
        return
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def as_trainer(model: nn.Module, cfg: Mapping[str, Any]) -> Trainer:
    """The model itself if it is a trainer, else a detector as tools see it.

    Raises:
        ConfigError: it is neither a trainer nor one of mmdet's detectors.
    """
    if isinstance(model, Trainer):
        return model
    if not hasattr(model, "data_preprocessor") or not hasattr(model, "backbone"):
        raise ConfigError(f"{type(model).__name__} is neither a core.Trainer nor a detector of mmdet")
    return Detector(model, cfg)


class Detector(Trainer):
    """One of mmdet's detectors with a trainer's methods; its state dict is that of the detector.

    The cost of a detector is counted on its backbone, as papers on backbones do; a training step is the whole one.

    Args:
        network: the detector.
        cfg: the experiment, for the test pipeline and the names of the classes.
        show_above: boxes of at least that score are drawn.
    """

    def __init__(self, network: nn.Module, cfg: Mapping[str, Any], show_above: float = 0.3) -> None:
        super().__init__()
        self.network = network
        self.show_above = show_above
        loaders = (cfg.get(f"{split}_dataloader") for split in ("test", "val", "train"))
        first = (one for loader in loaders for one in eval_sets.loaders(loader, "dataloader").values())
        self.dataset: Mapping[str, Any] = next((loader["dataset"] for loader in first), {})

    # ------------------------------------------------------------------ steps
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """mmdet's loss terms; those of several levels or stages are summed."""
        terms = self.network(**self.network.data_preprocessor(batch, True), mode="loss")
        return {k: sum(v.mean() for v in value) if isinstance(value, list) else value for k, value in terms.items()}

    def val_step(self, data: Batch) -> list[Any]:
        """A list of mmdet's ``DetDataSample``."""
        with torch.no_grad(), self.autocast():
            return self.network.val_step(data)

    test_step = val_step

    # ------------------------------------------------------------------ state
    @property
    def named_by(self) -> nn.Module:
        """The detector, whose names the entries of the state dict have."""
        return self.network

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """The detector's."""
        return self.network.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Into the detector."""
        return self.network.load_state_dict(state_dict, *args, **options)

    # ------------------------------------------------------------------ what tools look at
    def networks(self) -> dict[str, nn.Module]:
        """Backbone and neck."""
        return networks(self.network)

    def inference_network(self) -> nn.Module:
        """The backbone."""
        return self.network.backbone

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Any, ...]:
        """One image tensor (B, 3, H, W) of the size that the test pipeline resizes to."""
        return (torch.zeros(batch_size, *self.input_size(), device=device),)

    def input_size(self) -> tuple[int, int, int]:
        """(3, H, W) of a typical landscape image after the test pipeline: (3, 800, 1280) for COCO's (1333, 800).

        Papers count that size: short side 800, and COCO's usual aspect makes the long one 1.6 times as long.

        Raises:
            ConfigError: the test pipeline resizes to no fixed scale.
        """
        scales = [step["scale"] for step in self.dataset.get("pipeline", ()) if step.get("scale")]
        if not scales:
            raise ConfigError("the test pipeline has no Resize with a `scale`, so the detector has no typical size")
        long, short = max(scales[-1]), min(scales[-1])
        return 3, short, long if long == short else int(min(long, 1.6 * short)) // 32 * 32

    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """Noise with one box and its mask in every image."""
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        _, height, width = self.input_size()
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], device=device)
        mask = np.zeros((1, height, width), np.uint8)
        mask[:, height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 1
        samples = []
        for number in range(batch_size):
            sample = DetDataSample(
                metainfo={
                    "img_id": number,
                    "img_shape": (height, width),
                    "ori_shape": (height, width),
                    "scale_factor": (1.0, 1.0),
                }
            )
            sample.gt_instances = InstanceData(
                bboxes=box.clone(),
                labels=torch.zeros(1, dtype=torch.long, device=device),
                masks=BitmapMasks(mask, height, width),
            )
            sample.ignored_instances = InstanceData(bboxes=box[:0], labels=torch.zeros(0, dtype=torch.long))
            samples.append(sample)
        pixels = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, device=device)
        return {"inputs": list(pixels), "data_samples": samples}

    # ------------------------------------------------------------------ inference
    def infer(self, file: Path) -> Inference:
        """Boxes and masks of an image file; the record lists them as COCO's result format does."""
        from core.data import load_image

        image = np.asarray(load_image(file))
        found = self.val_step(self._prepare(image, file))[0].pred_instances.cpu()
        classes, ids = self.classes(), self._category_ids()
        detections = []
        for index, (box, label, score) in enumerate(
            zip(found.bboxes.tolist(), found.labels.tolist(), found.scores.float().tolist(), strict=True)
        ):
            entry: dict[str, Any] = {"category": classes[label], "score": round(score, 4)}
            if classes[label] in ids:
                entry["category_id"] = ids[classes[label]]
            entry["bbox"] = [round(v, 2) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]
            if "masks" in found:
                entry["segmentation"] = _run_lengths(found.masks[index])
            detections.append(entry)
        record = {"width": image.shape[1], "height": image.shape[0], "detections": detections}
        return Inference(record, {"detections": self._draw(image, found, classes)})

    def classes(self) -> list[str]:
        """Names of the classes: the config's, or those of the dataset's class."""
        from core.config.registry import DATASETS, resolve

        named = (self.dataset.get("metainfo") or {}).get("classes")
        if named is None and "type" in self.dataset:
            named = getattr(resolve(self.dataset["type"], DATASETS), "METAINFO", {}).get("classes")
        if named is None:
            raise ConfigError("nothing names the detector's classes: set val_dataloader.dataset.metainfo.classes")
        return [named] if isinstance(named, str) else list(named)

    def _prepare(self, image: np.ndarray, file: Path) -> Batch:
        """The batch of one RGB image, through the test pipeline."""
        from mmengine.dataset import Compose, pseudo_collate

        from core.config.registry import openmmlab, openmmlab_scope, resolve

        steps = [dict(step) for step in self.dataset.get("pipeline", ())]
        steps = [step for step in steps if not str(step["type"]).endswith("LoadAnnotations")]
        if not steps or not str(steps[0]["type"]).endswith("LoadImageFromFile"):
            raise ConfigError("the test pipeline has to begin with LoadImageFromFile")
        resolve("mmdet.LoadImageFromNDArray")  # registers mmdet
        steps[0] = {**steps[0], "type": "mmdet.LoadImageFromNDArray"}
        with openmmlab_scope("mmdet"):
            pipeline = Compose(openmmlab(steps))
        return pseudo_collate([pipeline({"img": image[..., ::-1].copy(), "img_id": 0, "img_path": str(file)})])

    def _category_ids(self) -> dict[str, int]:
        """Name -> number in the annotation file, where that is there."""
        path = Path(self.dataset.get("data_root") or "", self.dataset.get("ann_file") or "")
        if not path.is_file():
            return {}
        categories = read_json(path).get("categories", [])
        check_records(path, "categories", categories, {"name": str, "id": (int, str)})
        return {entry["name"]: entry["id"] for entry in categories}

    def _draw(self, image: np.ndarray, found: Any, classes: Sequence[str]) -> np.ndarray:
        from torchvision.transforms.functional import resize
        from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

        shown = found[found.scores >= self.show_above]
        shown = shown[shown.scores.argsort()]  # the best are drawn last
        picture = torch.from_numpy(image.copy()).permute(2, 0, 1)
        factor = max(1, round(_LEGIBLE / max(image.shape[:2])))
        picture = resize(picture, [factor * n for n in image.shape[:2]], antialias=True)
        if not len(shown):
            return picture.permute(1, 2, 0).numpy()
        colours = [_colour(label) for label in shown.labels.tolist()]
        if "masks" in shown:
            masks = shown.masks.bool()
            # torchvision blackens what several masks have: a pixel is left to the best of them.
            masks = masks & (masks.flip(0).cumsum(0).flip(0) == 1)
            masks = masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
            picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
        names = [
            f"{classes[label]} {score:.2f}"
            for label, score in zip(shown.labels.tolist(), shown.scores.tolist(), strict=True)
        ]
        picture = draw_bounding_boxes(
            picture,
            shown.bboxes * factor,
            names,
            colors=colours,
            width=2,
            font=_font(),
            font_size=max(10, max(picture.shape[1:]) // 36),
            fill_labels=True,
        )
        return picture.permute(1, 2, 0).numpy()


def _font() -> str:
    """A font file that can be drawn in any size; it comes with matplotlib."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _run_lengths(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a mask (H, W)."""
    from pycocotools import mask as coding

    encoded = coding.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def _colour(label: int) -> tuple[int, int, int]:
    """A colour per class; neighbours in the list of classes differ clearly."""
    import colorsys

    hue = (0.13 + label * 0.618034) % 1.0
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
