"""Public names, one import each: the package loads them from here when they are first used."""

from .ema import EMA as EMA
from .ema import AveragedNetwork as AveragedNetwork
from .eval_loop import EvalLoop as EvalLoop
from .eval_sets_loop import EvalSetsLoop as EvalSetsLoop
from .hooks.checkpoint import CheckpointHook as CheckpointHook
from .hooks.early_stopping import EarlyStopping as EarlyStopping
from .hooks.ema import EMAHook as EMAHook
from .hooks.logging import LoggingHook as LoggingHook
from .hooks.media import MediaHook as MediaHook
from .loop import TrainLoop as TrainLoop
from .optim import OptimWrapper as OptimWrapper
from .optim import OptimWrapperDict as OptimWrapperDict
from .param_groups import OptimConstructor as OptimConstructor
from .runner import Runner as Runner
from .schedules import Schedule as Schedule
from .trainer import Trainer as Trainer
from .visualization import CSV as CSV
from .visualization import JsonLines as JsonLines
from .visualization import TensorBoard as TensorBoard
from .visualization import Wandb as Wandb
