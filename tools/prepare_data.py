"""Data sets into the layout that the readers expect.

  python tools/prepare_data.py list                                       every task with its arguments
  python tools/prepare_data.py list paper=stvit                           a paper's tasks
  python tools/prepare_data.py task=imagenet train=ILSVRC2012_img_train.tar output=data/imagenet
  python tools/prepare_data.py task=imagenet val=ILSVRC2012_img_val.tar devkit=ILSVRC2012_devkit_t12.tar.gz \\
      output=data/imagenet
  python tools/prepare_data.py task=image_zip root=data/imagenet output=data/imagenet_zip
  python tools/prepare_data.py task=image_shards root=data/imagenet split=train output=data/imagenet_shards
  python tools/prepare_data.py task=image_shards --help                   what a task does and takes

A task that was stopped goes on where it was when it is called again.
"""

if __name__ == "__main__":  # before the imports: stopped meanwhile, it ends with one line
    from core.config.command.signals import end_quietly

    end_quietly()

from core.config.command.cli import run
from core.data.prepare import main

if __name__ == "__main__":
    run(lambda argv: main(argv, __doc__))
