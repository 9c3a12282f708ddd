"""The engine: config, registries, launcher, data, metrics and tools. Nothing in it names a paper."""

from core.exports import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "trainer": "Trainer",
        "runner": "Runner",
        "loop": "TrainLoop",
        "eval_loop": "EvalLoop",
        "eval_sets_loop": "EvalSetsLoop",
        "optim": "OptimWrapper OptimWrapperDict",
        "param_groups": "OptimConstructor",
        "schedules": "Schedule",
        "ema": "EMA AveragedNetwork",
        "hooks.ema": "EMAHook",
        "hooks.logging": "LoggingHook",
        "hooks.media": "MediaHook",
        "hooks.checkpoint": "CheckpointHook",
        "hooks.early_stopping": "EarlyStopping",
        "visualization": "CSV JsonLines TensorBoard Wandb",
    },
)
