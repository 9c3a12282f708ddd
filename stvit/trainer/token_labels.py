"""What one step of LV-ViT is: every token is classified besides the image (Jiang et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.trainer import Batch
from stvit.losses import classification_loss
from stvit.models import LVViT
from stvit.trainer import ClassificationTrainer


class TokenLabelTrainer(ClassificationTrainer):
    """Cross-entropy of the image, and of its tokens with a weight.

    The authors' label maps, one for every image, come from a larger network (NFNet-F6) and are not at hand. Without
    them every token has the image's label, as in the authors' loss of a data set without maps. Their augmentation by
    mixing tokens of two images needs the maps and is left out.

    Args:
        network: an `LVViT`; without a classifier of tokens (semantic tokens) the image's loss alone is left.
        token_weight: weight of the tokens' loss; the authors' command line has 0.5.
        options: as in `ClassificationTrainer`.
    """

    def __init__(self, network: LVViT, token_weight: float = 0.5, **options: Any) -> None:
        super().__init__(network, **options)
        network.token_training = network.aux_head is not None
        self.token_weight = token_weight

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_cls`, `loss_tokens`, and where targets are not mixed `accuracy`, of the class token alone."""
        if self.mix is not None:
            batch = self.mix(batch)
        made = self.network(batch["image"])
        logits, tokens = made if isinstance(made, tuple) else (made, None)
        target = batch.get("target", batch["label"])
        terms = {"loss_cls": classification_loss(logits, target, self.smoothing)}
        if tokens is not None:
            labels = target.repeat_interleave(tokens.shape[1], dim=0)
            terms["loss_tokens"] = self.token_weight * classification_loss(tokens.flatten(0, 1), labels, self.smoothing)
        if "target" not in batch:
            terms["accuracy"] = (logits.detach().argmax(dim=1) == batch["label"]).float().mean()
        return terms
