"Preferences: a run that was stopped goes on exactly, what is refused, a base for a LoRA."
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
    data.cache=0 reading_pairs=0 preference.every=2 preference.candidates=3 preference.measured=2
    sample_num_steps=1 train.steps=4 train.batch_size=4 train.log_every=1 train.val_every=0
    train.val_batches=1 train.sample_every=0 train.save_every=2 train.precision=32-true
""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
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
    assert [line["step"] for line in lines if "score" in line] == [1, 2, 3, 4]
    assert 0 <= lines[-1]["val_score"] <= 1


@pytest.mark.parametrize("override,names", [
    ("preference.judge=mother", ["preference.judge=mother", "checker, clip, likelihood, both"]),
    ("preference.candidates=1", ["candidates must be at least 2"]),
    ("train.init_from=null", ["give train.init_from"]),
    ("data.name=digits", ["knows the shapes world alone"]),
])
def test_refused_in_one_line(tmp_path, override, names):
    with pytest.raises(T2IError) as refused:
        train("shapes-preferences", tmp_path/"run", (*SHORT, override))
    said = str(refused.value)
    assert "\n" not in said and all(name in said for name in names), said


@pytest.mark.parametrize("judge", ["clip", "likelihood", "both"])
def test_other_judges(tmp_path, judge):
    more = f"preference.judge={judge}", "train.steps=1", "train.save_every=0"
    train("shapes-preferences", tmp_path/"run", (*SHORT, *more))
    line = next(line for line in read_metrics(tmp_path/"run") if "pairs" in line)
    assert line["pairs"] == 1  # two scores are never alike


def test_a_lora_on_such_a_run_learns_from_images_alone(run):
    config = LoRATaskConfig(base=str(run), data=DataConfig("shapes"))
    assert base_task(config).config.preference.weight == 0


def test_one_pass_per_map(tmp_path):
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
    train(tmp_path/"own.yaml", tmp_path/"run", (*small, *own))
    line = read_metrics(tmp_path/"run")[-1]
    assert line["pairs"] == 1 and line["val_score"] < 0  # nats
