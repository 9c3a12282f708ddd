"""The backbones in OpenMMLab's registries, for configs of mmdet's (or mmsegmentation's) own runner.

.. code-block:: python

    custom_imports = dict(imports=["stvit"])
    model = dict(
        backbone=dict(
            _delete_=True,
            type="vitrine.STViTRSwin",
            arch="small",
            drop_path_rate=0.2,
            init_cfg=dict(type="Pretrained", checkpoint="STViT-R-Swin-S.pth"),
        ),
        neck=dict(in_channels=[96, 192, 384, 768]),
    )
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from core.config.registry import MODELS
from core.errors import ConfigError
from stvit.models.stvit_r_swin import STViTRSwin
from stvit.models.swin import SwinTransformer


class _Backbone(nn.Module):
    """What OpenMMLab's models expect of a backbone besides its maps: `init_cfg` and `init_weights`."""

    def __init__(self, *args: Any, init_cfg: Mapping[str, Any] | None = None, **options: Any) -> None:
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or not init_cfg.get("checkpoint")):
            raise ValueError(
                f"init_cfg={dict(init_cfg)}: without it the backbone is initialised as published; "
                "dict(type='Pretrained', checkpoint=FILE_OR_URL) loads weights, with prefix= those below a prefix"
            )
        super().__init__(*args, features_only=True, **options)
        self.init_cfg = init_cfg
        self.is_init = False

    def init_weights(self) -> None:
        """Loads the weights that `init_cfg` names: a released classifier, backbone or detector, or a file of ours.

        Raises:
            CheckpointMismatch: they are not those of this model.
        """
        if self.init_cfg is not None and not self.is_init:
            from stvit.checkpoint import convert
            from stvit.checkpoint.state import inside, unwrap

            place = str(self.init_cfg["checkpoint"])
            state = _read(place)
            if prefix := self.init_cfg.get("prefix"):
                prefix = f"{prefix.rstrip('.')}."
                state = inside(unwrap(state, bare=False), prefix)
                if not state:
                    raise ConfigError(f"init_cfg: {place} has no name that begins with '{prefix}'")
            self.load_state_dict(convert(state, self))
        self.is_init = True


def _read(place: str) -> Mapping[str, Any]:
    """The content of a weights file: a path, or an address that mmengine's own loader knows (`https://`, ...).

    Raises:
        ConfigError: it cannot be downloaded.
    """
    if "://" not in place:
        from core.checkpoint import load_official

        return load_official(place)
    from mmengine.runner import CheckpointLoader

    try:
        return CheckpointLoader.load_checkpoint(place, map_location="cpu")
    except Exception as error:  # of whatever library serves that kind of address
        raise ConfigError(
            f"init_cfg: mmengine cannot load {place} ({type(error).__name__}: {error}). Download the file, and give "
            "its path as checkpoint"
        ) from error


@MODELS.register_module(name="STViTRSwin")
class STViTRSwinBackbone(_Backbone, STViTRSwin):
    """`STViTRSwin` with maps of the stages as its output; arguments are its own, and `init_cfg`.

    Args:
        init_cfg: None, or ``dict(type="Pretrained", checkpoint=FILE_OR_URL)``.
    """


@MODELS.register_module(name="STViTSwinTransformer")
class SwinBackbone(_Backbone, SwinTransformer):
    """`stvit.models.SwinTransformer` likewise: plain Swin on the same code (mmdet has one of its own).

    Args:
        init_cfg: None, or ``dict(type="Pretrained", checkpoint=FILE_OR_URL)``.
    """
