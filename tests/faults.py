"""Runs a small training in child processes that die at chosen moments. Usage: faults.py FOLDER

The dying is planted, not timed: a child kills itself with SIGKILL after a given step, in the middle
of writing a given file, or while it validates, so that every run of this program takes the same
course.
"""
import os
import signal
import sys
from pathlib import Path

import t2i.engine.runs as runs
import t2i.training as training

RECIPE = """
task: t2i.tokenizers.training.TokenizerTask
model:
  resolution: 32
  scales: [1, 2, 4]
  codebook_size: 32
  code_dim: 4
  channels: 32
  multipliers: [1, 2]
  blocks: 1
  attention: false
  patch: 4
data: {name: digits}
adversarial: 0.8
feature_matching: 1.0
discriminator: {channels: 32, layers: 2, r1: 0.1, start: 4, warmup: 4}
train:
  steps: 12
  batch_size: 8
  accumulate: 2
  precision: 32-true
  warmup: 3
  log_every: 1
  val_every: 6
  val_batches: 1
  sample_every: 0
  save_every: 2
  keep: 2
  clip: 0.5
"""


def child(folder, run, resume, sabotage=None):
    "One training process; returns the signal that ended it, or 0"
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if sabotage:
        sabotage()
    training.train(folder/"recipe.yaml", folder/run, resume=resume)
    os._exit(0)


def die():
    "Leave no time for anything"
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(step):
    "SIGKILL once this many steps are done"
    train_step = training.train_step

    def deadly(state, data):
        logs = train_step(state, data)
        if state.step == step:
            die()
        return logs

    training.train_step = deadly


def die_while_validating(step):
    "SIGKILL in the validation of a step whose checkpoint is written already"
    validate = training.validate

    def deadly(state):
        if state.step == step:
            die()
        return validate(state)

    training.validate = deadly


def die_inside_write(step):
    "SIGKILL when the second file of the checkpoint of this step is half written"
    save = runs.save_file

    def deadly(tensors, path):
        save(tensors, path)
        if f"step-{step}" in str(path) and path.name == "ema.safetensors":
            os.truncate(path, path.stat().st_size//2)
            die()

    runs.save_file = deadly


def main(folder):
    "One run that is never stopped, and one that dies five times"
    (folder/"recipe.yaml").write_text(RECIPE)
    assert child(folder, "whole", False) == 0
    moments = [(die_after, 3), (die_after, 5), (die_while_validating, 6), (die_inside_write, 8)]
    for n, (sabotage, step) in enumerate([*moments, (die_after, 11)]):
        ended = child(folder, "killed", n > 0, lambda sabotage=sabotage, step=step: sabotage(step))
        assert ended == -signal.SIGKILL
    assert child(folder, "killed", True) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
