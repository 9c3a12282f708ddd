"""Training with a teacher: what DynamicViT needs beside the classification loss, and of use to every other reducer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.precision import no_autocast
from stvit.trainer.classification import ClassificationTrainer


class DistillationTrainer(ClassificationTrainer):
    """`ClassificationTrainer` whose network also follows a frozen teacher, usually the full ViT that it started from.

    The losses of DynamicViT (section 3.3 of that paper): cross-entropy, its keep ratio, the divergence of the logits
    from the teacher's, and the distance of kept tokens from the teacher's.

    Args:
        network: as in `ClassificationTrainer`.
        teacher: a network of the same interface; never trained, always in evaluation mode.
        teacher_weights: a run's checkpoint of a `ClassificationTrainer` with the teacher as its network, or a file with
            the teacher's own weights; None: the teacher stays as it was built (a checkpoint of this trainer has it).
        logit_weight: weight of the Kullback-Leibler divergence of the logits.
        token_weight: weight of the distance of the tokens, for networks that report kept tokens; 0 leaves it out.
        options: further arguments of `ClassificationTrainer`.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        teacher_weights: str | None = None,
        logit_weight: float = 0.5,
        token_weight: float = 0.5,
        **options: Any,
    ) -> None:
        options["frozen"] = (*options.pop("frozen", ()), "teacher")
        super().__init__(network, **options)
        self.teacher = teacher
        self.logit_weight = logit_weight
        self.token_weight = token_weight
        if teacher_weights is not None and next(teacher.parameters()).device.type != "meta":
            load_teacher(teacher, teacher_weights)

    def further_losses(self, images: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """`loss_distill`, and the network's own terms, which may follow the teacher's tokens, too."""
        with torch.no_grad():
            tokens = self.teacher.forward_features(images)
            guide = self.teacher.forward_head(tokens)
        terms = {"loss_distill": self.logit_weight * logit_divergence(logits, guide)}
        if hasattr(self.network, "auxiliary_losses"):
            follow = {"teacher_tokens": tokens, "token_weight": self.token_weight} if self.token_weight else {}
            terms |= self.network.auxiliary_losses(**follow)
        return terms


def logit_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || network)` of the class distributions, a float32 scalar: the mean over `(B, classes)` samples.

    No gradient reaches the teacher.
    """
    with no_autocast(logits):
        own, guide = logits.float().log_softmax(dim=1), teacher.detach().float().log_softmax(dim=1)
        return F.kl_div(own, guide, reduction="batchmean", log_target=True)


def load_teacher(teacher: nn.Module, path: str) -> None:
    """Loads a teacher's weights, bare or as the `network` of a run's checkpoint (averaged weights where it has them).

    Raises:
        core.errors.ConfigError: no such file.
        core.checkpoint.StateMismatch: the weights are of another network.
    """
    from core.checkpoint.weights import load_weights

    load_weights(teacher, path, prefix="network.")
