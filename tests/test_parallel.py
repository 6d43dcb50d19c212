"Work and weights divided among processes: the numbers of one process, and files that one can load."
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
import t2i
from t2i import cli
from t2i.engine.checkpoints import last_checkpoint
from t2i.engine.runs import read_metrics

here = Path(__file__).resolve().parent


def run(folder, which):
    "The trainings of parallel.py"
    ended = processes.run(here/"parallel.py", folder, which)
    assert ended.returncode == 0, ended.stderr


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def saved(run):
    "Weights, averages and what the optimizer remembers, by name; and the random states"
    step = last_checkpoint(run)
    assert step.name == "step-4"
    state = torch.load(step/"state.pt", weights_only=True)
    parts = {name: load_file(step/f"{name}.safetensors") for name in ("model", "ema")}
    for memory in state["optimizers"].values():
        parts |= memory
    values = {(part, k): v for part, values in parts.items() for k, v in values.items()}
    return values, state["random"]


def assert_close(run, other, limit):
    "All that two runs saved is equal, up to rounding; 0: to the last bit"
    (a, random), (b, _) = saved(run), saved(other)
    assert a.keys() == b.keys() and len(a) > 100
    for name, value in a.items():
        assert value.shape == b[name].shape, name
        off = (value-b[name]).abs().max()
        assert off <= limit*b[name].abs().max(), (name, off)
    return random


def assert_equal_losses(run, other):
    a, b = losses(run), losses(other)
    assert len(a) == len(b) == 4 and max(a)-min(a) > .005  # it moved, by more than rounding
    assert a == pytest.approx(b, rel=1e-5)


def test_two_processes_that_share_the_work_equal_one(tmp_path):
    "With dropout and dropped captions: both draw the same masks. Stopped, they go on the same"
    run(tmp_path, "two")
    for name in ("adamw", "adafactor"):
        assert_equal_losses(tmp_path/f"two-{name}", tmp_path/f"one-{name}")
    random = assert_close(tmp_path/"again", tmp_path/"two-adamw", 0)
    assert len(random) == 1                          # one group, one state
    assert losses(tmp_path/"again") == losses(tmp_path/"two-adamw")
    assert_equal_losses(tmp_path/"alone", tmp_path/"two-adamw")  # goes on in one process
    pipe = t2i.load(tmp_path/"two-adamw")
    weights = pipe.generator.state_dict()
    kept = load_file(last_checkpoint(tmp_path/"one-adamw")/"ema.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, kept[f"generator.{name}"], rtol=1e-3, atol=1e-4)
    image, = pipe("a red circle", seed=0).images
    assert image.size == (64, 64)


def test_two_processes_that_share_the_weights_equal_one(tmp_path):
    run(tmp_path, "shared")
    assert_equal_losses(tmp_path/"two", tmp_path/"one-table")
    assert_close(tmp_path/"two", tmp_path/"one-table", 1e-3)


def test_a_divided_run_begins_with_the_weights_of_one_that_is_not(tmp_path):
    "The first process alone makes them; the others build the decoder without numbers"
    run(tmp_path, "start")
    expected = torch.load(tmp_path/"whole-0.pt")
    assert len(expected["model"]) > 40
    for name in ("fsdp-0", "fsdp-1", "two-0", "two-1", "whole-1"):
        found = torch.load(tmp_path/f"{name}.pt")
        for part, tensors in expected.items():
            assert found[part].keys() == tensors.keys()
            for key, value in tensors.items():
                assert torch.equal(found[part][key], value), (name, part, key)


@pytest.mark.slow  # it waits for seconds, which a busy machine may need for a step
def test_the_others_wait_as_long_as_the_first_process_fills_caches(tmp_path):
    "However short the time is after which processes give each other up"
    run(tmp_path, "wait")
    assert last_checkpoint(tmp_path/"run").name == "step-1"


@pytest.mark.slow  # four processes; two are tested above
@pytest.mark.parametrize("name", ["table", "table_adafactor"])
def test_a_table_of_two_by_two_processes(tmp_path, name):
    "Groups of two share the work, two groups the batch and the weights"
    run(tmp_path, name)
    assert_equal_losses(tmp_path/"four", tmp_path/f"one-{name}")
    random = assert_close(tmp_path/"again", tmp_path/"four", 0)
    assert len(random) == 2                          # a state for each group
    assert t2i.load(tmp_path/"four").generator.config.width == 32


def info(monkeypatch, capsys, *words):
    "What `t2i info` prints of a recipe"
    monkeypatch.setattr(sys, "argv", ["t2i", "info", *words, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return json.loads(capsys.readouterr().out)


def test_what_the_recipes_of_parti_cost(monkeypatch, capsys):
    "Both fit the devices that their comments name; on smaller ones, the settings that would fit do"
    small = info(monkeypatch, capsys, "parti-coco-350m", "--memory", "24")
    assert small["model"]["parameters"] > 350e6 and small["fit"]["fits"] == "yes"
    large = info(monkeypatch, capsys, "parti-3b-fsdp")
    assert large["model"]["parameters"] > 3e9 and large["fit"]["fits"] == "yes"
    assert large["memory"]["optimizer_gib"] < .1
    one = "train.devices=1", "train.tensor_parallel=1", "train.sharding=none"
    alone = info(monkeypatch, capsys, "parti-coco-350m", *one, "--memory", "16")
    assert alone["fit"]["fits"] == "no"
    settings = [word for word in alone["fit"]["would_fit"].split() if "=" in word]
    changed = info(monkeypatch, capsys, "parti-coco-350m", *one, *settings, "--memory", "16")
    assert settings and changed["fit"]["fits"] == "yes"
