"""Two processes train whole and sharded, and a sharded run that was stopped goes on.

torchrun --nproc-per-node=2 sharded.py FOLDER
"""
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

import float64_muon  # noqa: F401, Muon iterates in float64
import tiny
from t2i.training import train

GENERATOR = """
    train.steps=2 train.batch_size=8 train.precision=32-true train.val_every=0 train.val_batches=1
    train.sample_every=0 train.sharding=fsdp model.depth=2 data.cache=0 reading_pairs=0
    train.compile=false
""".split()


def rewind(run, to, step):
    "A copy of a run as it was after a step"
    shutil.copytree(run, to)
    shutil.rmtree(to/"checkpoints"/"step-6")
    (to/"last").write_text(f"step-{step}")


def main(folder):
    for name, sharding in (("whole", "none"), ("shards", "fsdp")):
        train(tiny.recipe(optimizer="muon", sharding=sharding), folder/name)
    if dist.get_rank() == 0:
        for name in ("again", "alone"):
            rewind(folder/"shards", folder/name, 4)
    dist.barrier()
    train(tiny.recipe(optimizer="muon", sharding="fsdp"), folder/"again", resume=True)
    train("digits-var", folder/"digits", GENERATOR)
    train("digits-var", folder/"digits-whole", [*GENERATOR, "train.sharding=none"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
