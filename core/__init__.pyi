"""Public names, one import each: the package loads them from here when they are first used."""

from .engine.hooks.checkpoint import CheckpointHook as CheckpointHook
from .engine.hooks.early_stopping import EarlyStopping as EarlyStopping
from .engine.hooks.ema import EMAHook as EMAHook
from .engine.hooks.logging import LoggingHook as LoggingHook
from .engine.hooks.media import MediaHook as MediaHook
from .engine.loops.eval_sets import EvalSetsLoop as EvalSetsLoop
from .engine.loops.evaluation import EvalLoop as EvalLoop
from .engine.loops.train import TrainLoop as TrainLoop
from .engine.runner import Runner as Runner
from .optim.ema import EMA as EMA
from .optim.ema import AveragedNetwork as AveragedNetwork
from .optim.groups import OptimConstructor as OptimConstructor
from .optim.schedules import Schedule as Schedule
from .optim.wrapper import OptimWrapper as OptimWrapper
from .optim.wrapper import OptimWrapperDict as OptimWrapperDict
from .output.backends import CSV as CSV
from .output.backends import JsonLines as JsonLines
from .output.backends import TensorBoard as TensorBoard
from .output.backends import Wandb as Wandb
from .trainer import Trainer as Trainer
