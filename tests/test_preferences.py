"Preferences: a run that was stopped goes on exactly, what is refused, other judges and tasks."
import shutil

import pytest
import torch
from safetensors.torch import load_file

from t2i.control.lora import LoRATaskConfig, base_task
from t2i.core import T2IError
from t2i.data.datasets import DataConfig
from t2i.engine.recipes import find_recipe
from t2i.engine.runs import read_metrics
from t2i.training import train

SHORT = """
    reading_pairs=0 vocabulary_captions=50 preference.captions=8 preference.candidates=3
    preference.measured=2 preference.judge=clip sample_num_steps=1 train.steps=4 train.batch_size=4
    train.log_every=1 train.val_every=0 train.val_batches=1 train.sample_every=0 train.save_every=2
    train.precision=32-true train.workers=0
""".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Drawings of all tests, so that each is made once"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2I_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, home):
    folder = tmp_path_factory.mktemp("runs")/"whole"
    train("shapes-preferences", folder, tuple(SHORT))
    return folder


def test_a_stopped_run_goes_on_exactly(run, tmp_path):
    stopped = shutil.copytree(run, tmp_path/"stopped")
    shutil.rmtree(stopped/"checkpoints"/"step-4")
    (stopped/"last").write_text("step-2")
    train(stopped/"recipe.yaml", stopped, resume=True)
    for name in ("model.safetensors", "ema.safetensors"):
        files = [folder/"checkpoints"/"step-4"/name for folder in (run, stopped)]
        whole, again = map(load_file, files)
        assert all(torch.equal(whole[key], again[key]) for key in whole)
    lines = read_metrics(run)
    assert [line["step"] for line in lines if "told_apart" in line] == [1, 2, 3, 4]
    assert lines[0]["better"] == lines[0]["worse"] == 0  # the model is its reference at first
    assert -1 <= lines[-1]["val_score"] <= 1


def test_another_reference_is_refused(run, tmp_path):
    stopped = shutil.copytree(run, tmp_path/"stopped")
    parts = (stopped/"parts.json").read_text()
    assert '"reference"' in parts
    shutil.rmtree(stopped/"checkpoints"/"step-4")
    (stopped/"last").write_text("step-2")
    found = parts.split('"reference"')[1].split('"fingerprint": "')[1][:16]
    (stopped/"parts.json").write_text(parts.replace(found, "0"*16))
    with pytest.raises(T2IError, match="was trained with reference shapes-var"):
        train(stopped/"recipe.yaml", stopped, resume=True)


@pytest.mark.parametrize("override,names", [
    ("preference.judge=mother", ["preference.judge=mother", "checker, clip, likelihood, both"]),
    ("preference.candidates=1", ["preference.candidates=1", "at least 2"]),
    ("train.init_from=null", ["give train.init_from"]),
])
def test_refused_in_one_line(home, tmp_path, override, names):
    with pytest.raises(ValueError) as refused:
        train("shapes-preferences", tmp_path/"run", (*SHORT, override))
    said = str(refused.value)
    assert "\n" not in said and all(name in said for name in names), said


def test_the_checker_knows_no_digits(home, tmp_path):
    more = "data.name=digits", "preference.judge=checker"
    with pytest.raises(T2IError, match="knows the shapes world alone"):
        train("shapes-preferences", tmp_path/"run", (*SHORT, *more))


@pytest.mark.parametrize("judge", ["checker", "likelihood", "both"])
def test_other_judges(home, tmp_path, judge):
    more = f"preference.judge={judge}", "train.steps=1", "train.save_every=0"
    train("shapes-preferences", tmp_path/"run", (*SHORT, *more))
    lines = read_metrics(tmp_path/"run")
    assert lines[0]["better"] == 0 and ("val_score" in lines[-1]) == (judge != "both")


def test_a_lora_on_such_a_run_learns_from_images(run):
    task = base_task(LoRATaskConfig(base=str(run), data=DataConfig("shapes")))
    task.prepare(torch.device("cpu"))
    assert task.reference is None and "image" in task.dataset("train")[0]


def test_one_pass_per_map(home, tmp_path):
    small = """
        model.depth=1 model.width=32 model.heads=1 text.depth=1 text.width=32 text.heads=1
        vocabulary_captions=50 data.cache=0 reading_pairs=0 train.steps=1 train.batch_size=4
        train.log_every=1 train.val_every=0 train.val_batches=1 train.sample_every=0
        train.compile=false
    """.split()
    train("small-text-var", tmp_path/"start", tuple(small))
    text = find_recipe("small-text-var").read_text()
    plain, learns = "text_training.TextVARTask", "preferences.OnePassPreferenceTask"
    assert plain in text
    (tmp_path/"own.yaml").write_text(text.replace(plain, learns))
    own = f"train.init_from={tmp_path/'start'}", "preference.judge=likelihood"
    own = *own, "preference.captions=4", "preference.measured=2"
    train(tmp_path/"own.yaml", tmp_path/"run", (*small, *own))
    lines = read_metrics(tmp_path/"run")
    assert lines[0]["told_apart"] == 0 and lines[-1]["val_score"] < 0  # nats
