"""The network of a config: a backbone of timm, its pre-trained weights, and a method in it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from core.checkpoint.weights import read, state_in
from core.errors import ConfigError
from petl.checkpoint import convert, load_choice, resize_positions
from petl.models.inject import PetlModel, inject
from petl.models.methods import SCT, Method, Together


def build(
    backbone: nn.Module,
    method: Method,
    num_classes: int,
    weights: str | Path | None = None,
    head_init: str = "trunc",
    frozen_mode: str = "train",
) -> PetlModel:
    """A method in a backbone, as configs build it: ``network: {type: petl.build, backbone: ..., method: ...}``.

    Args:
        backbone: of timm, e.g. ``{type: timm.create_model, model_name: vit_base_patch16_224}``.
        method: e.g. ``{type: petl.TTC, channels: {stage: choose, file: channels.safetensors}}``; `channels` may be the
            path of a file of `petl.save_choice`.
        num_classes: of the new head.
        weights: file of the pre-trained weights (`.npz` of Google's release, or any state dict of timm's names).
        head_init, frozen_mode: see `petl.inject`.

    Raises:
        ConfigError: no such file, or it does not fit; channels that were chosen at another site.
        petl.NoSite: the backbone has no place for the method.
    """
    if weights is not None:
        load_backbone(backbone, weights)
    _with_channels(method)
    model = inject(backbone, method, num_classes=num_classes, head_init=head_init, frozen_mode=frozen_mode)
    model.weights = None if weights is None else str(weights)
    return model


def load_backbone(backbone: nn.Module, weights: str | Path) -> None:
    """Reads pre-trained weights into a plain backbone; its classifier's are left out, positions are resized.

    A backbone on the meta device takes none.

    Raises:
        ConfigError: no such file, or it does not fit.
    """
    if any(parameter.is_meta for parameter in backbone.parameters()):
        return  # built to be counted: there is nothing to be read into
    path = Path(weights)
    if not path.is_file():
        raise ConfigError(f"network.weights={weights}: no such file; null begins with untrained weights")
    state, _ = state_in(read(path), path)
    state = resize_positions(convert({n.removeprefix("network.backbone."): v for n, v in state.items()}), backbone)
    head = backbone.get_classifier()
    heads = {name for name, module in backbone.named_modules() if module is head}
    state = {n: v for n, v in state.items() if n.rpartition(".")[0] not in heads}
    result = backbone.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name.rpartition(".")[0] not in heads]
    if missing or result.unexpected_keys:
        raise ConfigError(f"{weights} does not fit: missing {missing[:6]}, unexpected {result.unexpected_keys[:6]}")


def _with_channels(method: Method) -> None:
    """Reads the channels that a method names by a file."""
    if isinstance(method, Together):
        for inner in method.methods:
            _with_channels(inner)
    elif isinstance(method, SCT) and isinstance(method.source, (str, Path)):
        channels, scores = load_choice(method.source)
        if scores.site != method.site:
            raise ConfigError(
                f"{method.source} holds channels of the site '{scores.site}', the method has '{method.site}'"
            )
        method.channels = channels


def unchosen(model: PetlModel) -> str:
    """What is said when a network without chosen channels is to be trained."""
    return (
        f"the channels of {model.method!r} were never chosen: name the file of an earlier stage, "
        "channels={stage: choose, file: channels.safetensors}, or a list of indices for every block"
    )


def checked_pretrained(pretrained: str) -> str:
    """`required` or `optional`.

    Raises:
        ConfigError: anything else.
    """
    if pretrained not in ("required", "optional"):
        raise ConfigError(f"pretrained={pretrained} is neither required nor optional")
    return pretrained


def require_weights(network: nn.Module, pretrained: str) -> None:
    """Refuses to train a network whose config names no pre-trained weights where they are required.

    Raises:
        ConfigError: see above.
    """
    if pretrained == "required" and getattr(network, "weights", None) is None:
        raise ConfigError(
            "model.network.weights names no file: a method would be tuned in an untrained network. Give the backbone's "
            "pre-trained weights (ViT-B_16.npz, or any file of timm names), or model.pretrained=optional"
        )
