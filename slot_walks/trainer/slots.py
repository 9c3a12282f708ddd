"""What one step of cyclic walks is: slots of pictures or of cached features, the losses, and masks for evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor
from torch.utils.data import Dataset

from core.checkpoint import load
from core.engine.state.randomness import own_rows
from core.layers import weight_files
from core.layers.noise import sample_noise as sample_noise
from core.layers.precision import full_precision
from core.trainer import Batch, Inference, Trainer
from slot_walks.data.feature_cache import FeatureCache
from slot_walks.data.transforms import WholePicture
from slot_walks.inference.files import infer_picture, scenes_picture
from slot_walks.losses.walk_loss import WalkLoss, reconstruction_loss
from slot_walks.losses.walks import region_vectors, segments, transitions
from slot_walks.metrics.diagnostics import effective_slots, pair_shares, token_labels, usage_entropy
from slot_walks.models import SlotWalker, WalkerOutput
from slot_walks.models.weights import untrained

weight_files.read_file = load  # models import nothing of the engine

MASK_SOURCES = ("walk", "attention", "product", "decoder")


class SlotTrainer(Trainer):
    """Slots trained by walks, by a decoder, or by both, as the network's `signal` says (sections 3 and 4 of the paper).

    A batch has `image` `(B, 3, H, W)`, or `features` of a cache, `(B, h, w, C)` or `(B, N, C)` (then with `grid` where
    it is no square). `noise` `(B, K, D)` in a batch is the slots' noise. A label map `mask` `(B, H, W)` gives the size
    of predicted masks; without one it is the picture's.

    Args:
        network: the model.
        loss: of the walks; its temperature is also that of masks. None: the defaults of `WalkLoss`.
        decoder_weight: weight of the reconstruction beside the walks.
        mask_source: what masks are read from: `walk`, the part-to-slot transition; `attention`, the slot attention;
            `product`, the two multiplied; `decoder`. None: `walk` if the signal has walks, else `decoder`.
        draws: how often each picture's slots are drawn in evaluation. A start that is not sampled is run once, and its
            result stands for all draws.
        noise_seed: of these draws.
        num_slots: K in evaluation; None: as in training.
        input_shape: `(3, H, W)` of an input, for profiles; None: that of the network's `feature_grid`.
        cache: where features of the training pictures are kept; None: the backbone runs in every step.
        transform: from a PIL picture to an input, for `tools/infer.py`; it also shows pictures as they were before.
        patch: where the walk begins that is shown, as shares of a picture's height and width; None: see `choose_patch`.
        diagnose: predictions have `gradient_cosine` `(B,)`, that of the two walks' gradients over the batch.
        frozen: see `core.Trainer`; the backbone is frozen anyway.

    Raises:
        ValueError: an unknown mask source, or one that the network has not; fewer than one draw; a patch outside;
            `diagnose` of slots that cannot be compared with features.
    """

    def __init__(
        self,
        network: SlotWalker,
        loss: WalkLoss | None = None,
        decoder_weight: float = 1.0,
        mask_source: str | None = None,
        draws: int = 1,
        noise_seed: int = 0,
        num_slots: int | None = None,
        input_shape: Sequence[int] | None = None,
        cache: FeatureCache | None = None,
        transform: WholePicture | None = None,
        patch: Sequence[float] | None = None,
        diagnose: bool = False,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__(frozen)
        self.cache = cache
        self.network = network
        self.loss = WalkLoss() if loss is None else loss
        self.decoder_weight = decoder_weight
        source = ("walk" if "walk" in network.signals else "decoder") if mask_source is None else mask_source
        if source not in MASK_SOURCES:
            raise ValueError(f"unknown mask_source {source!r}: use {', '.join(MASK_SOURCES)}")
        if source == "decoder" and network.decoder is None:
            raise ValueError("mask_source=decoder needs a decoder: set the network's signal to mlp, broadcast, ...")
        comparable = network.to_feature is not None or network.encoder.dim == network.encoder.in_dim
        if source in ("walk", "product") and not comparable:
            raise ValueError(f"mask_source={source} compares slots with features, but they have different widths")
        if draws < 1:
            raise ValueError(f"draws={draws}: at least one is needed")
        self.mask_source, self.noise_seed, self.num_slots = source, noise_seed, num_slots
        if patch is not None and not (len(patch) == 2 and all(0 <= share <= 1 for share in patch)):
            raise ValueError(f"patch={patch}: give two shares of height and width, from 0 to 1, as in [0.5, 0.25]")
        if diagnose and not comparable:
            raise ValueError("diagnose=true needs walks between slots and features, but they have different widths")
        self.draws, self.diagnose = draws, diagnose
        self.transform, self.patch = transform, None if patch is None else tuple(patch)
        self._looked_at_backbone = False
        self.input_shape = self._example_shape() if input_shape is None else tuple(input_shape)

    # ------------------------------------------------------------------ training
    def training_data(self, dataset: Dataset) -> Dataset:
        """The features of a data set's pictures where there is a `cache`, which is filled first."""
        return self._kept(dataset)

    def evaluation_data(self, dataset: Dataset) -> Dataset:
        """Features beside the images of an evaluation, where the `cache` keeps them, too."""
        return self._kept(dataset, beside=True) if self.cache is not None and self.cache.evaluation else dataset

    def _kept(self, dataset: Dataset, beside: bool = False) -> Dataset:
        if self.cache is None or not self.keeps_data or self.network.backbone is None:
            return dataset
        self._look_at_backbone()
        return self.cache.fill(dataset, self.network.backbone, self.autocast, beside, precision=self.precision)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_wpw`, `loss_pwp` (weighted) and `loss_reconstruction`, as the signal says, with what tells of progress.

        `pwp_kl` is the row cross-entropy of P-W-P above its lower bound; `effective_slots` and `usage_entropy` are
        means over the batch.
        """
        output = self._forward(batch, noise=self._training_noise(batch), decode=True)
        terms: dict[str, Tensor] = {}
        assignment = output.assignment
        if "walk" in self.network.signals:
            walks = self.loss(output.features, output.whole, output.grid, output.assignment, output.attention)
            terms["loss_wpw"] = self.loss.alpha * walks["wpw"]
            if "pwp" in walks:
                terms["loss_pwp"], terms["pwp_kl"] = self.loss.beta * walks["pwp"], walks["pwp_kl"]
            assignment = walks["to_slot"]
        if output.reconstruction is not None:
            error = reconstruction_loss(output.reconstruction, output.features)
            terms["loss_reconstruction"] = self.decoder_weight * error
        with torch.no_grad():
            terms["effective_slots"] = effective_slots(assignment.detach()).mean()
            terms["usage_entropy"] = usage_entropy(assignment.detach()).mean()
        return terms

    # ------------------------------------------------------------------ evaluation
    def predict(self, batch: Batch) -> dict[str, Any]:
        """Segments of the pictures, with what clustering and diagnosis need.

        Returns:
            `segments`: the slot of every pixel, `(B, H, W)` uint8, or `(B, R, H, W)` for R draws. Of the first draw:
            `slots` `(B, K, D)`; `assignment` `(B, N, K)`, the soft masks on the grid; `regions` `(B, K, C)`, where
            walks lead; `effective_slots` `(B,)`. With a label map that the grid divides, `pairs_same` and `pairs_other`
            `(B,)`: see `slot_walks.metrics.diagnostics.pair_shares`. Other keys are the batch's own.
        """
        first = None
        winners = []
        features = grid = None
        for draw in range(self.draws if self.network.encoder.init.samples else 1):
            output = self._forward(
                batch,
                features,
                grid,
                noise=self._noise(batch, draw),
                num_slots=self.num_slots,
                decode=self.mask_source == "decoder",
            )
            features, grid = output.features, output.grid
            assignment, regions = self.assign(output)
            winners.append(segments(assignment, output.grid, self._size(batch, output.grid)))
            first = first or (output, assignment, regions)
        output, assignment, regions = first
        predicted = {key: value for key, value in batch.items() if key not in ("image", "features", "noise")}
        predicted |= {
            "segments": winners[0] if self.draws == 1 else torch.stack(winners, dim=1).expand(-1, self.draws, -1, -1),
            "slots": output.slots,
            "assignment": assignment,
            "effective_slots": effective_slots(assignment),
        }
        if regions is not None:
            predicted["regions"] = regions
        if self.diagnose:
            predicted["gradient_cosine"] = self._gradient_cosine(batch, features, grid).expand(len(features))
        return predicted | self._pairs(batch, output)

    @torch.enable_grad()
    def _gradient_cosine(self, batch: Batch, features: Tensor, grid: tuple[int, int]) -> Tensor:
        output = self._forward(
            batch, features, grid, noise=self._noise(batch, 0), num_slots=self.num_slots, decode=False
        )
        trained = [parameter for parameter in self.network.encoder.parameters() if parameter.requires_grad]
        return self.loss.gradient_cosine(output, trained, grid).detach()

    def assign(self, output: WalkerOutput) -> tuple[Tensor, Tensor | None]:
        """Parts over slots `(B, N, K)` by the mask source, rows summing to one, and region vectors `(B, K, C)`.

        Region vectors follow the walk from slot to part; None where slots cannot be compared with features.
        """
        walk = regions = None
        if output.whole is not None:
            walk, to_part = transitions(output.features, output.whole, self.loss.temperature)
            regions = region_vectors(to_part, output.features)
        if self.mask_source == "walk":
            return walk, regions
        if self.mask_source == "attention":
            return full_precision(output.assignment), regions
        if self.mask_source == "decoder":
            return full_precision(output.decoder_masks).transpose(1, 2), regions
        product = walk * full_precision(output.assignment)
        return product / product.sum(dim=2, keepdim=True).clamp(min=1e-12), regions

    def _forward(
        self, batch: Batch, features: Tensor | None = None, grid: tuple[int, int] | None = None, **options: Any
    ) -> WalkerOutput:
        """The network on a batch; features that are known already are not computed again."""
        if features is None:
            features, grid = batch.get("features"), _grid(batch.get("grid"))
        if features is not None:
            return self.network(features=features, grid=grid, **options)
        self._look_at_backbone()
        return self.network(batch["image"], **options)

    def _look_at_backbone(self) -> None:
        """Says once, when its features are first wanted, that a backbone has random weights."""
        if self._looked_at_backbone or self.network.backbone is None or torch.compiler.is_compiling():
            return
        self._looked_at_backbone = True
        if untrained(self.network.backbone):
            print_log(
                f"{type(self.network.backbone).__name__} has random weights, so its features mean nothing: set "
                "model.network.backbone.weights to a file such as DINO's dino_deitsmall8_pretrain.pth",
                "current",
                logging.WARNING,
            )

    def _example_shape(self) -> tuple[int, int, int] | None:
        if self.network.backbone is None:
            return None
        height, width = (side * self.network.backbone.patch_size for side in self.network.feature_grid)
        return 3, height, width

    def _training_noise(self, batch: Batch) -> Tensor | None:
        """The batch's noise, or what one process with the batches of all would draw for these samples."""
        encoder = self.network.encoder
        if "noise" in batch or not encoder.init.samples:
            return batch.get("noise")
        mu, shape = encoder.init.mu, (encoder.num_slots, encoder.dim)
        rows = len(batch["features"] if "features" in batch else batch["image"])
        return own_rows(lambda count: torch.randn(count, *shape, device=mu.device, dtype=mu.dtype), rows)

    def _noise(self, batch: Batch, draw: int) -> Tensor | None:
        encoder = self.network.encoder
        if not encoder.init.samples:
            return None
        if "noise" in batch and draw == 0:
            return batch["noise"]
        count = encoder.num_slots if self.num_slots is None else self.num_slots
        noise = sample_noise(batch["sample_id"], count, encoder.dim, seed=self.noise_seed, draw=draw)
        return noise.to(self.device, non_blocking=True)

    def _size(self, batch: Batch, grid: tuple[int, int]) -> tuple[int, int]:
        for key in ("mask", "image"):
            if key in batch:
                return tuple(batch[key].shape[-2:])
        return grid

    def _pairs(self, batch: Batch, output: WalkerOutput) -> dict[str, Tensor]:
        mask, (height, width) = batch.get("mask"), output.grid
        if mask is None or mask.shape[-2] % height or mask.shape[-1] % width:
            return {}
        same, other = pair_shares(output.features, token_labels(mask, output.grid), self.loss.threshold)
        return {"pairs_same": same, "pairs_other": other}

    # ------------------------------------------------------------------ pictures
    def media(self, batch: Batch) -> dict[str, Any]:
        """The pictures of a batch, their slots, the truth, and a walk: `{"slots": (height, width, 3) uint8}`."""
        if "image" not in batch:
            return {}
        output, assignment = self._walked(batch)
        return {"slots": scenes_picture(batch, output, assignment, self.loss, self.transform, self.patch)}

    def infer(self, file: Path) -> Inference:
        """Slots of a picture file of any size and shape; see `slot_walks.inference.files.infer_picture`.

        Slots that are sampled have the noise of draw 0 and of the file's name, so that results can be repeated.

        Raises:
            ValueError: the trainer was built without a `transform`.
            OSError: no picture, or a broken one.
        """
        from core.data import load_image

        if self.transform is None:
            raise ValueError(
                "this experiment has no transform for files: set model.transform (slot_walks.WholePicture)"
            )
        picture = load_image(file)
        batch = {"image": self.transform(picture).to(self.device)[None], "sample_id": [Path(file).name]}
        with torch.no_grad(), self.autocast():
            output, assignment = self._walked(batch)
            return infer_picture(np.asarray(picture), output, assignment, self.loss, self.patch)

    def _walked(self, batch: Batch) -> tuple[WalkerOutput, Tensor]:
        """The network's output for the first draw, and parts over slots `(B, N, K)`."""
        decode = self.mask_source == "decoder"
        output = self._forward(batch, noise=self._noise(batch, 0), num_slots=self.num_slots, decode=decode)
        return output, self.assign(output)[0]

    # ------------------------------------------------------------------ what tools look at
    def example_batch(self, batch_size: int, device: torch.device | str) -> Batch:
        """A batch of made-up pictures with a label map of background; of features, where training reads these."""
        names = [str(i) for i in range(batch_size)]
        if self.cache is not None:
            shape = (batch_size, *self.network.feature_grid, self.network.encoder.in_dim)
            return {"features": torch.randn(shape, device=device).to(self.cache.dtype), "sample_id": names}
        (image,) = self.example_inputs(batch_size, device)
        return {
            "image": torch.rand_like(image) if image.device.type != "meta" else image,
            "mask": torch.zeros(batch_size, *image.shape[-2:], dtype=torch.long, device=device),
            "sample_id": names,
        }

    def table_figures(self, cfg: Any) -> dict[str, float]:
        """Figures for tables that need no data: multiply-accumulates of the parts for one picture, forward.

        `macs_backbone`, `macs_slots` (projection and slot attention), `macs_decoder`, `macs_walk` (what the walks add
        in training: affinities, similarities and the product P Q), `macs_training` (their sum, as the signal says),
        `decoder_parameters`, and what one row of each walk weighs in the loss (`row_wpw`, `row_pwp`, and `row_ratio`,
        the latter over the former). Nothing where there is no `input_shape`.
        """
        if self.input_shape is None:
            return {}
        from core.profile.measure import count_macs

        network, device = self.network, self.device
        image = torch.zeros(1, *self.input_shape, device=device)
        grid = network.backbone.grid(image)
        features = torch.zeros(1, grid[0] * grid[1], network.encoder.in_dim, device=device)
        slots = torch.zeros(1, network.encoder.num_slots, network.encoder.dim, device=device)
        noise = slots if network.encoder.init.samples else None
        figures = {
            "macs_backbone": count_macs(network.backbone, (image,)).total,
            "macs_slots": count_macs(network.encoder, (features, noise)).total,
            "macs_decoder": 0,
            "macs_walk": 0,
            "decoder_parameters": 0,
        }
        if network.decoder is not None:
            figures["macs_decoder"] = count_macs(network.decoder, (slots, grid, features)).total
            figures["decoder_parameters"] = sum(p.numel() for p in network.decoder.parameters())
        if "walk" in network.signals:
            whole = torch.zeros(1, network.encoder.num_slots, network.encoder.in_dim, device=device)
            attention = torch.zeros(1, network.encoder.num_slots, features.shape[1], device=device)
            inputs = (features, whole, grid, attention.transpose(1, 2), attention)
            figures["macs_walk"] = count_macs(self.loss, inputs).total
            weights = self.loss.row_weights(network.encoder.num_slots, features.shape[1])
            figures |= dict(zip(("row_wpw", "row_pwp"), weights, strict=True))
            if weights[0]:
                figures["row_ratio"] = weights[1] / weights[0]
        training = sum(figures[f"macs_{part}"] for part in ("backbone", "slots", "decoder", "walk"))
        return figures | {"macs_training": training}


def _grid(grid: Any) -> tuple[int, int] | None:
    """The one grid of a batch: `(h, w)`, a list of them, or a tensor `(B, 2)`."""
    if grid is None:
        return None
    first = grid[0]
    if isinstance(first, int) or (isinstance(first, Tensor) and first.ndim == 0):
        return int(grid[0]), int(grid[1])
    return int(first[0]), int(first[1])
