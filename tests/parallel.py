"""A tiny Parti trains in one process, in two that divide its layers or share its weights, and in
four that do both; runs that were stopped go on.

python parallel.py FOLDER two|shared|table|table_adafactor|start|wait
"""
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import processes
from t2i.core import T2IError
from t2i.engine.distributed import destroy_process_group
from t2i.engine.recipes import load_recipe
from t2i.engine.sharding import named_tensors, whole
from t2i.generators.parti_training import PartiTask
from t2i.training import TrainingState, train

SMALL = """
    clip=null contrast.weight=0 vocabulary_captions=50 reading_pairs=0 model.depth=1 model.width=32
    model.heads=2 text.depth=1 text.width=32 text.heads=2 train.steps=4 train.batch_size=8
    train.precision=32-true train.optimizer=adamw train.lr=0.01 train.warmup=1 train.log_every=1
    train.val_every=0 train.val_batches=1 train.sample_every=0 train.save_every=2 train.workers=0
    train.compile=false train.checkpointing=true
""".split()
SETTINGS = dict(
    adamw=["model.dropout=0.1"],
    adafactor=["model.dropout=0.1", "train.optimizer=adafactor", "train.lr=0.1",
               "condition_dropout=0.5"],
    table=["model.dropout=0"],  # each group would draw other masks
    table_adafactor=["model.dropout=0", "train.optimizer=adafactor", "train.lr=0.1"],
)


def small(folder, name, *more, resume=False):
    "A short training"
    train("shapes-parti", folder, (*SMALL, *SETTINGS[name], *more), resume)


def rewind(run, to):
    "A copy of a run as it was after two steps"
    shutil.copytree(run, to)
    shutil.rmtree(to/"checkpoints"/"step-4")
    (to/"last").write_text("step-2")


def in_processes(world, work, *arguments):
    "Run a function in several processes, as torchrun starts them"
    store, shared = processes.meeting(world)
    os.environ |= shared
    start = torch.multiprocessing.start_processes
    start(as_rank, (work, *arguments), world, start_method="fork")
    del store
    for name in shared:
        del os.environ[name]


def as_rank(rank, work, *arguments):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    work(*arguments)
    destroy_process_group()


def divided(folder, *names):
    "Two processes that compute the same images"
    two = "train.tensor_parallel=2"
    for name in names:
        small(folder/f"two-{name}", name, two)
    if int(os.environ["RANK"]) == 0:
        for copy in ("again", "alone"):
            rewind(folder/f"two-{names[0]}", folder/copy)
    dist.barrier()
    small(folder/"again", names[0], two, resume=True)
    for more, says in (("model.heads=1", "does not divide the 1 heads"),
                       ("train.tensor_parallel=3", "does not divide the number of processes")):
        try:
            small(folder/"refused", names[0], two, more)
        except T2IError as e:
            assert says in str(e), e
        else:
            raise AssertionError(f"{more} was not refused")


def table(folder, name):
    "Four processes: two groups share the weights, two processes of a group share the work"
    both = "train.tensor_parallel=2", "train.sharding=fsdp"
    small(folder/"four", name, *both)
    if int(os.environ["RANK"]) == 0:
        rewind(folder/"four", folder/"again")
    dist.barrier()
    small(folder/"again", name, *both, resume=True)


def started(folder):
    "Weights, buffers and averages with which runs of two processes begin, divided and whole"
    ways = dict(fsdp="train.sharding=fsdp", two="train.tensor_parallel=2", whole="train.devices=1")
    for name, more in ways.items():
        recipe = load_recipe("shapes-parti", (*SMALL, *SETTINGS["adamw"], more))
        state = TrainingState(recipe, folder/name)
        models = dict(model=state.model, ema=state.ema.module)
        tensors = {part: whole(named_tensors(model)) for part, model in models.items()}
        torch.save(tensors, folder/f"{name}-{os.environ['RANK']}.pt")
        state.held.close()


def patient(folder):
    "The first process fills its caches for longer than the others wait for it elsewhere"
    begin, prepare = dist.init_process_group, PartiTask.prepare
    brief = dict(timeout=timedelta(seconds=8))
    dist.init_process_group = lambda *given, **named: begin(*given, **named | brief)

    def slow(task, device):
        if dist.get_rank() == 0:
            time.sleep(10)
        prepare(task, device)

    PartiTask.prepare = slow
    small(folder/"run", "adamw", "train.steps=1")


def main(folder, which):
    "First the processes, then the trainings of this one: a process that computed is not forked"
    if which in ("start", "wait"):
        in_processes(2, dict(start=started, wait=patient)[which], folder)
        return
    if which == "shared":
        names = ["table"]
        in_processes(2, small, folder/"two", "table", "train.sharding=fsdp")
    elif which == "two":
        names = "adamw", "adafactor"
        in_processes(2, divided, folder, *names)
        small(folder/"alone", names[0], "train.tensor_parallel=1", resume=True)
    else:
        names = [which]
        in_processes(4, table, folder, which)
    for name in names:
        small(folder/f"one-{name}", name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
