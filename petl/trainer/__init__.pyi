"""Names of this folder, loaded when they are first used."""

from .choose import ChooseChannels as ChooseChannels
from .network import build as build
from .network import load_backbone as load_backbone
from .packed import PackedTrainer as PackedTrainer
from .packed import build_packed as build_packed
from .transfer import TransferTrainer as TransferTrainer
