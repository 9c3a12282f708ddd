"""Any ViT of timm as a frozen backbone: DINOv2, DINOv3, MAE, CLIP, supervised ones."""

from __future__ import annotations

from os import PathLike

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.layers.recorded import fixed
from slot_walks.models.vit import FACETS, check_choice
from slot_walks.models.weights import read_backbone


class TimmBackbone(nn.Module):
    """Patch features of a timm model, at any picture size that its patches divide.

    Positions are resized the way timm does; for DINO's own way, and its published numbers, use `DinoViT`.

    Args:
        name: for `timm.create_model`, e.g. `vit_base_patch14_dinov2.lvd142m`.
        pretrained: download timm's weights (needs a connection or timm's cache).
        weights: a local checkpoint of that model instead.
        final_norm: whether features pass the last layer norm.
        layer: the layer whose output is taken, counted from 1; None: the last.
        facet: `token`, or `query`, `key` or `value` of the layer's attention (before rotary positions).

    Raises:
        ValueError: the model is no ViT, or see `DinoViT`.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        weights: str | PathLike[str] | None = None,
        final_norm: bool = False,
        layer: int | None = None,
        facet: str = "token",
    ) -> None:
        super().__init__()
        try:
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError as error:
            raise ValueError(f"timm's {name} is no ViT that takes pictures of any size: {error}") from error
        self.layer = check_choice(len(self.model.blocks), layer, facet, final_norm)
        if facet != "token" and not isinstance(getattr(self._attention(), "qkv", None), nn.Linear):
            raise ValueError(f"timm's {name} has no joint qkv projection to take a {facet} from: use facet='token'")
        self.final_norm, self.facet = final_norm, facet
        self.dim = self.model.num_features
        self.patch_size = self.model.patch_embed.patch_size[0]
        if weights is not None:
            read_backbone(self.model, weights)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """`(h, w)` of patches of pictures `(B, 3, H, W)`."""
        height, width = fixed(image, -2, -1)
        return height // self.patch_size, width // self.patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Features `(B, h*w, C)` in row-major order of pictures `(B, 3, H, W)`."""
        if self.facet == "token":
            return self._run(image)
        attention, read = self._attention(), []
        hook = attention.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            (patches,) = fixed(self._run(image), 1)
        finally:
            hook.remove()
        qkv = F.linear(read[0][:, -patches:], attention.qkv.weight, _bias(attention))
        return qkv.chunk(3, dim=-1)[FACETS.index(self.facet) - 1]

    def _attention(self) -> nn.Module:
        return self.model.blocks[self.layer - 1].attn

    def _run(self, image: Tensor) -> Tensor:
        (features,) = self.model.forward_intermediates(
            image,
            indices=[self.layer - 1],
            norm=self.final_norm,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return features


def _bias(attention: nn.Module) -> Tensor | None:
    """Bias of the joint projection; some families keep it in three parts."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
