"""Every row of a table of parameter-efficient transfer as one object (section 2.5)."""

from petl.models.methods.adapters import Adapter, AdaptFormer, Convpass, RepAdapter
from petl.models.methods.base import Match, Method, Together
from petl.models.methods.channel import SCT, TTC
from petl.models.methods.lowrank import FacT, LoRA
from petl.models.methods.own import BitFit, Full, Linear, LNTune, Partial
from petl.models.methods.prompts import VPT, NOAHSubnet
from petl.models.methods.scale_shift import SSF

METHODS: dict[str, type[Method]] = {
    kind.__name__: kind
    for kind in (
        AdaptFormer,
        Adapter,
        BitFit,
        Convpass,
        FacT,
        Full,
        LNTune,
        Linear,
        LoRA,
        NOAHSubnet,
        Partial,
        RepAdapter,
        SCT,
        SSF,
        TTC,
        Together,
        VPT,
    )
}

__all__ = ["METHODS", "Match", *METHODS]
