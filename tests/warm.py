"What `processes.py` imports once, for all processes that it starts."
# `tensorboard` is left to each process: some tests put a broken one in its place
import lightning.fabric  # noqa: F401
import open_clip  # noqa: F401
import pytest  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

import t2i.generators.parti_training  # noqa: F401
import t2i.generators.text_training  # noqa: F401
import t2i.generators.var_training  # noqa: F401
import t2i.guidance.vqgan_clip  # noqa: F401
import t2i.tokenizers.training  # noqa: F401
