"LoRA: one line for what is missing or wrong, and a run of the command line"
import errno
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from t2i.cli import app
from t2i.control import lora
from t2i.control.contours import write_outlined
from t2i.control.lora import LoRAConfig, add_lora, load_lora, lora_layers, read_lora, save_lora
from t2i.core import T2IError
from t2i.engine.files import bundled_folder
from t2i.outputs import read_about
from t2i.saved import load
from t2i.training import train


def one_line(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 1 and not isinstance(result.exception, AssertionError)
    return str(result.exception) if isinstance(result.exception, T2IError) else result.output


def test_without_peft_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"LoRA needs peft: pip install -e '.\[train\]'"):
        load("shapes-lora", "cpu")


def test_unmatched_target_is_an_error_of_the_recipe(tmp_path):
    images = write_outlined(tmp_path/"images", 2)
    said = one_line("train", "lora-folder", f"data.path={images}", "lora.targets=[attn.query]",
                    "-o", str(tmp_path/"run"))
    assert "no linear layer is called 'attn.query'" in said


def test_lora_of_another_base_is_refused():
    said = one_line("generate", "a handwritten two", "-m", "digits-var", "--lora", "shapes-lora",
                    "-n", "1")
    assert "shapes-lora was trained on other weights than these: load shapes-var" in said


def test_an_edited_image_tells_its_lora_and_what_was_to_be_avoided(tmp_path):
    pipe = load("shapes-var", "cpu")
    pipe.load_lora("shapes-lora", .5)
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    asked = dict(negative_prompt="a star", seed=0, guidance_scale=2.)
    out = pipe.edit(torch.zeros(3, 64, 64), mask, "a red circle", **asked)
    path, = out.save(tmp_path/"edited.png")
    about = read_about(path)
    told = about["lora"], about["negative_prompt"], about["guidance_scale"], about["model"]
    assert told == ("{'shapes-lora': 0.5}", "a star", "2.0", "shapes-var")
    assert "num_steps" not in about  # which editing does not read


def test_two_blend_and_off_is_the_base(tmp_path):
    pipe = load("shapes-var", "cpu")
    asked = dict(prompt="a large red circle", seed=0, num_steps=1)
    plain = pipe(**asked).images[0]
    again = shutil.copytree(bundled_folder("shapes-lora"), tmp_path/"again")
    pipe.load_lora("shapes-lora", .5)
    half = pipe(**asked).images[0]
    pipe.load_lora(again, .5)  # two halves of one change are the change
    both = pipe(**asked)
    assert both.settings["lora"] == {"shapes-lora": .5, "again": .5}
    pipe.set_lora({"shapes-lora": 1.})
    whole = pipe(**asked).images[0]
    assert np.abs(np.subtract(both.images[0], whole, dtype=int)).max() <= 1
    assert not np.array_equal(half, whole)
    with pytest.raises(T2IError, match="'again' is nan; it must be a finite number"):
        pipe.set_lora({"again": float("nan")})
    assert pipe.loras == {"shapes-lora": 1.}
    pipe.set_lora({})
    assert np.array_equal(pipe(**asked).images[0], plain)


def test_what_drew_an_image_is_told_after_merging_and_switching_off():
    asked = dict(prompt="a large red circle", seed=0, num_steps=1)
    pipe = load("shapes-var", "cpu")
    pipe.load_lora("shapes-lora", .5)
    pipe.merge_lora()
    told = pipe(**asked).settings
    assert (told["model"], told["merged_lora"]) == ("shapes-var", {"shapes-lora": .5})
    styled = load("shapes-lora", "cpu")
    assert styled(**asked).settings["model"] == "shapes-lora"
    styled.unload_lora()
    off = styled(**asked)
    assert off.settings["model"] == "shapes-var" and "lora" not in off.settings
    plain = load("shapes-var", "cpu")(**asked)
    assert np.array_equal(off.images[0], plain.images[0])


def test_a_lora_that_was_merged_into_a_base_that_is_not_saved_is_refused(tmp_path):
    pipe = load("shapes-boxes", "cpu")
    pipe.load_lora("shapes-lora")
    pipe.merge_lora()
    with pytest.raises(T2IError, match="shapes-lora was merged into weights that shapes-boxes"):
        pipe.save_pretrained(tmp_path/"model")
    assert not (tmp_path/"model").exists()


@pytest.mark.parametrize("field, value", [
    ("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"fc1": 3}),
    ("rank_pattern", {"fc1": 3}), ("modules_to_save", ["norm"]), ("target_modules", ".*fc1")])
def test_loras_that_would_act_otherwise_in_peft_are_refused(tmp_path, field, value):
    folder = shutil.copytree(bundled_folder("shapes-lora"), tmp_path/"style")
    path = folder/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(T2IError, match=field):
        load("shapes-var", "cpu").load_lora(folder)


def test_a_lora_comes_before_bf16():
    pipe = load("shapes-var", "cpu").to(torch.bfloat16)
    with pytest.raises(T2IError, match="load the LoRA first"):
        pipe.load_lora("shapes-lora")


def test_a_saved_factor_is_warned_of(tmp_path, caplog):
    pipe = load("shapes-var", "cpu")
    pipe.load_lora("shapes-lora", .5)
    pipe.save_pretrained(tmp_path/"half")
    assert "shapes-lora acts with factor 0.5" in caplog.text and (tmp_path/"half").is_dir()


def test_a_lora_on_a_part_of_the_blocks_is_loaded_again(tmp_path, monkeypatch):
    model = load("shapes-var", "cpu").lora_host
    add_lora(model, LoRAConfig(2, targets=["blocks.0.attn.qkv"]))
    (layer,) = lora_layers(model).values()
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    save_lora(model, tmp_path/"lora", "shapes-var")
    config, _ = read_lora(tmp_path/"lora")
    (name,) = config.targets
    assert name.endswith("blocks.0.attn.qkv")
    weights = tmp_path/"lora"/"adapter_model.safetensors"
    usual = tmp_path/"usual"
    usual.touch()
    assert weights.stat().st_mode == usual.stat().st_mode
    other = load("shapes-var", "cpu").lora_host
    load_lora(other, tmp_path/"lora")
    assert [*lora_layers(other)] == [name]

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(lora, "save_file", full)
    with pytest.raises(T2IError, match="the disk is full"):
        save_lora(model, tmp_path/"second", "shapes-var")
    assert not list((tmp_path/"second").iterdir())               # no config without weights


def test_a_checkpoint_holds_the_frozen_base_once(tmp_path):
    images = write_outlined(tmp_path/"images", 4)
    brief = """train.steps=4 train.batch_size=2 train.warmup=0 train.lr=0.01 train.save_every=2
        train.val_every=0 train.val_batches=1 train.precision=32-true""".split()
    whole = train("lora-folder", tmp_path/"whole", (f"data.path={images}", *brief))

    def weights(run, step):
        folder = run/"checkpoints"/f"step-{step}"
        return [load_file(folder/f"{name}.safetensors") for name in ("model", "ema")]

    model, ema = weights(whole, 2)
    assert model and all(".lora_" in name for name in model) and model.keys() < ema.keys()
    assert len(ema) > 100 and any(not torch.equal(model[name], ema[name]) for name in model)
    for name in ("new", "old"):
        run = shutil.copytree(whole, tmp_path/name)
        shutil.rmtree(run/"checkpoints"/"step-4")
        (run/"last").write_text("step-2")
        if name == "old":  # as checkpoints were: with the base in both files
            save_file(ema | model, run/"checkpoints"/"step-2"/"model.safetensors")
        train("lora-folder", run, resume=True)
        for ours, others in zip(weights(run, 4), weights(whole, 4)):
            assert ours.keys() == others.keys()
            assert all(torch.equal(ours[key], others[key]) for key in ours)
    assert load(whole, "cpu").loras == {"default": 1.}
