"A stage of a speedrun goes on after a kill, whenever it came: with what the kill left on the disk."
import shutil
from functools import partial

import pytest
from lightning.fabric.strategies import Strategy
from safetensors.torch import load_file

import t2i.engine.runs as runs
from t2i.core import T2IError
from t2i.engine.checkpoints import last_checkpoint
from t2i.engine.runs import read_metrics
from t2i.speedruns import run_stage
from tiny import TinyTask

RECIPE = "tiny.yaml"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    "Runs the smallest recipe as a stage of the speedrun in a folder"
    monkeypatch.chdir(tmp_path)
    (tmp_path/RECIPE).write_text("task: tiny.TinyTask\ndropout: 0.5\n")
    return partial(run_stage, RECIPE, overrides=())


def copy_when(monkeypatch, place, name, source, target, when=lambda *args: True):
    "At the first call of a function, copies a folder: SIGKILL at this moment would leave the same"
    original = getattr(place, name)

    def copying(*args, **kwargs):
        if when(*args) and not target.exists():
            shutil.copytree(source, target)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, copying)


MOMENTS = {
    "while it prepares": (TinyTask, "prepare"),
    "in the first step": (TinyTask, "after_step"),
    "in the first checkpoint": (runs, "save_file"),
    "before `last` is written": (runs, "atomic_path", lambda path: path.name == "last"),
    "in the second checkpoint": (runs, "save_file", lambda _, path: "step-4" in str(path)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_stage_goes_on(stage, tmp_path, monkeypatch, moment):
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    place, name, *when = MOMENTS[moment]
    with monkeypatch.context() as patch:
        copy_when(patch, place, name, whole, killed, *when)
        done = stage(whole)
    again = stage(killed)
    assert again["steps"] == done["steps"] == 6
    weights = [load_file(last_checkpoint(f/RECIPE)/"model.safetensors") for f in (whole, killed)]
    assert all(weights[0][k].equal(weights[1][k]) for k in weights[0])
    steps = [line["step"] for line in read_metrics(whole/RECIPE)]
    assert steps == [line["step"] for line in read_metrics(killed/RECIPE)]


def test_a_stage_that_is_stopped_before_its_first_step(stage, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "reduce_boolean_decision", lambda *args, **more: True)
        with pytest.raises(T2IError, match="stopped in tiny.yaml before its first step"):
            stage(tmp_path/"run")
    assert stage(tmp_path/"run")["steps"] == 6
