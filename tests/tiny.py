"The smallest task that has every part: a block, dropout, noise of the stream, a discriminator."
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from omegaconf import OmegaConf

from t2i.core import fold_in
from t2i.engine.recipes import Recipe
from t2i.training import Task, TrainConfig

SHORT = dict(
    steps=6, batch_size=4, lr=1e-2, warmup=2, ema=.9, precision="32-true", log_every=1,
    val_every=0, val_batches=1, sample_every=0, save_every=2)


@dataclass
class TinyConfig:
    hidden:int = 8
    dropout:float = 0.
    adversarial:bool = False
    note:str|None = None
    train:TrainConfig = field(default_factory=lambda: TrainConfig(**SHORT))


class Net(nn.Module):
    def __init__(self, hidden, dropout):
        super().__init__()
        self.first = nn.Linear(2, hidden)
        self.blocks = nn.ModuleList([nn.Linear(hidden, hidden)])
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.last(self.dropout(self.blocks[0](self.first(x).tanh())))


class TinyTask(Task):
    "Points in the plane, to be turned by a quarter"
    Config = TinyConfig

    def __init__(self, config, folder=None):
        super().__init__(config, folder)
        self.model = Net(config.hidden, config.dropout)
        if config.adversarial:
            self.discriminator = nn.Linear(2, 1)

    def dataset(self, split):
        points = torch.rand(40, 2, generator=fold_in(0, split == "val"))
        return [dict(x=x) for x in points]

    def training_step(self, batch):
        x = batch["x"]
        y = self.model(x + .1*batch["u"][:, None])
        self.last_batch = y.detach()
        loss = F.mse_loss(y, torch.stack([-x[:, 1], x[:, 0]], 1))
        return loss, dict(error=loss.sqrt())

    def discriminator_step(self, batch):
        if self.step < 1:
            return None, {}
        loss = F.softplus(self.discriminator(self.last_batch)).mean()
        return loss, dict(discriminator=loss)

    def discriminator_optimizer(self):
        return torch.optim.AdamW(self.discriminator.parameters(), lr=1e-2)

    def sample(self):
        return torch.rand(2, 3, 8, 8)*2 - 1  # must not change what is trained


class CaptionedTask(TinyTask):
    "Samples with captions"
    def sample(self):
        return super().sample(), ["one", "zwei, drei…"]


class ContrastiveTask(TinyTask):
    "A loss that is not the mean over the parts of a batch"
    splittable = False


def recipe(task=TinyTask, config=None, **train):
    "A recipe without a file"
    config = config or TinyConfig()
    config = replace(config, train=replace(config.train, **train))
    tree = OmegaConf.to_container(OmegaConf.structured(config))
    return Recipe(task, config, dict(task=f"tiny.{task.__name__}") | tree)
