"""Runs a small training in child processes that die at chosen moments. Usage: faults.py FOLDER

The dying is planted, not timed: a child kills itself with SIGKILL after a given step, or in the middle of writing a
given file, so that every run of this program takes the same course.
"""
import os, signal, sys
from pathlib import Path

import t2i.engine.runs as runs
import t2i.training as training

RECIPE = Path(sys.argv[1])/"recipe.yaml"
RECIPE.write_text("""
task: t2i.tokenizers.training.TokenizerTask
model: {resolution: 32, scales: [1, 2, 4], codebook_size: 32, code_dim: 4, channels: 32, multipliers: [1, 2], blocks: 1, attention: false, patch: 4}
data: {name: digits}
adversarial: 0.8
feature_matching: 1.0
discriminator: {channels: 32, layers: 2, r1: 0.1, start: 4, warmup: 4}
train: {steps: 12, batch_size: 8, accumulate: 2, precision: 32-true, warmup: 3, log_every: 1, val_every: 6, val_batches: 1, sample_every: 0, save_every: 2, keep: 2, clip: 0.5}
""")


def child(run, resume, sabotage=lambda: None):
    "One training process; returns the signal that ended it, or 0"
    if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sabotage()
    training.train(RECIPE, run, resume=resume)
    os._exit(0)


def die_after(step):
    "SIGKILL once this many steps are done"
    def plant():
        train_step = training.train_step
        def deadly(state, data):
            logs = train_step(state, data)
            if state.step == step: os.kill(os.getpid(), signal.SIGKILL)
            return logs
        training.train_step = deadly
    return plant


def die_inside_write(step):
    "SIGKILL when the second file of the checkpoint of this step is half written"
    def plant():
        save = runs.save_file
        def deadly(tensors, path):
            save(tensors, path)
            if f"step-{step}" in str(path) and path.name == "ema.safetensors":
                os.truncate(path, path.stat().st_size//2)
                os.kill(os.getpid(), signal.SIGKILL)
        runs.save_file = deadly
    return plant


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    assert child(folder/"whole", False) == 0
    moments = [3, 5, 11] # drawn once; the write that is broken off comes between them
    for n, sabotage in enumerate([*map(die_after, moments[:2]), die_inside_write(8), die_after(moments[2])]):
        assert child(folder/"killed", n > 0, sabotage) == -signal.SIGKILL
    assert child(folder/"killed", True) == 0
