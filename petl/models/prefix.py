"""The part of a tuned network that no training changes: computed once for every image instead of in every step.

With trainable parameters only from block l on, the blocks before it are the same function in every step (section 12);
with none but the head's, so is the whole backbone, and a linear probe works from one vector an image.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from petl.models.inject import PetlModel
from petl.models.sites import NoSite


class FrozenPrefix:
    """Cuts a tuned network behind what is frozen.

    `depth` is the number of frozen blocks; `pooled` says that everything before the head is frozen: then features are
    vectors `(B, C)`, else tokens `(B, N, C)` behind block `depth - 1`.

    Args:
        model: from `petl.inject`.

    Raises:
        NoSite: nothing is frozen throughout, since the first block is tuned or acts at random in training; or part of
            the blocks of a network that is not a plain ViT.
    """

    def __init__(self, model: PetlModel) -> None:
        backbone = model.backbone
        self.model = model
        touched = {
            name
            for name, module in backbone.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False)) and not model.in_head(f"backbone.{name}.")
        }
        touched |= {name for name, module in backbone.named_modules() if _tuned(module)}
        if model.frozen_mode == "train":
            touched |= {name for name, m in backbone.named_modules() if _random(m)}
        touched = {name for name in touched if not model.in_head(f"backbone.{name}.") and name != model.head_name}
        self.pooled = not touched
        if self.pooled:
            self.depth = -1
            return
        if type(backbone) is not VisionTransformer:
            raise NoSite(
                f"{type(backbone).__name__}: only a plain ViT is cut between blocks; tuned are {sorted(touched)[:4]}"
            )
        blocks = [int(name.split(".")[1]) for name in touched if name.startswith("blocks.")]
        behind = [name for name in touched if not name.startswith("blocks.")]
        early = [name for name in behind if name.split(".")[0] not in ("norm", "fc_norm", "head_drop")]
        self.depth = min(blocks, default=len(backbone.blocks))
        if early or not self.depth:
            first = sorted(early) or [f"blocks.{self.depth}"]
            raise NoSite(f"nothing is frozen throughout: {first[0]} is tuned, or random in training (frozen_mode=eval)")

    def features(self, image: Tensor) -> Tensor:
        """What is kept of `image` `(B, 3, H, W)`: `(B, C)` where `pooled`, else `(B, N, C)`."""
        backbone = self.model.backbone
        if self.pooled:
            return backbone.forward_head(backbone.forward_features(image), pre_logits=True)
        x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(image))))
        for block in backbone.blocks[: self.depth]:
            x = block(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """`(B, classes)` of what `features` has given."""
        backbone = self.model.backbone
        if self.pooled:
            return backbone.get_classifier()(features)
        for block in backbone.blocks[self.depth :]:
            features = block(features)
        return backbone.forward_head(backbone.norm(features))

    def state(self) -> dict[str, Tensor]:
        """The weights that `features` depends on."""
        behind = tuple(f"blocks.{i}." for i in range(self.depth, len(getattr(self.model.backbone, "blocks", ()))))
        late = () if self.pooled else (*behind, "norm.", "fc_norm.")
        own = self.model.backbone.state_dict()
        return {
            n: v for n, v in own.items() if not self.model.in_head(f"backbone.{n}") and not n.startswith(late or "\0")
        }


def _tuned(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(type(getattr(hook, "__self__", None)).__module__.startswith("petl.models") for hook in hooks)


def _random(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    rate = getattr(module, "drop_prob", None)
    rate = getattr(module, "p", 0.0) if rate is None and isinstance(module, nn.modules.dropout._DropoutNd) else rate
    return bool(rate)
