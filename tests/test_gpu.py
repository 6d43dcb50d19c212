"On a GPU: `pytest -m gpu`. Training, resuming and drawing there, beside the CPU."
import math

import numpy as np
import pytest
import torch
from PIL import Image

import t2i
from t2i.data.datasets import ShapesDataset
from t2i.data.shapes import render, sample_scene
from t2i.engine.files import bundled_folder
from t2i.engine.runs import read_metrics
from t2i.guidance.clip import load_clip
from t2i.tokenizers.training import load_tokenizer
from t2i.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
RECIPES = [
    "shapes-msvq", "shapes-vqgan", "shapes-gumbel-vqgan", "shapes-vit-vqgan", "shapes-clip",
    "shapes-var", "shapes-class-var", "shapes-parti", "shapes-sr4", "adapter-shapes",
    "adapter-shapes-images", "new-class", "text-pretraining", "boxes-shapes", "shapes-clip-var",
    "digits-msvq", "digits-var", "emoji-msvq", "emoji-clip", "emoji-var", "own-msvq", "own-var"]
SHORT = (
    "train.steps=4", "train.batch_size=8", "train.warmup=2", "train.val_batches=1", "train.keep=9",
    "train.val_every=0", "train.sample_every=0", "train.save_every=0", "train.log_every=1")


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def write_photos(folder):
    "A folder of 32 captioned images"
    folder.mkdir(exist_ok=True)
    for i in range(32):
        scene = sample_scene(i, "single_object")
        Image.fromarray(render(scene)).save(folder/f"{i}.png")
        (folder/f"{i}.txt").write_text(scene.caption)
    return folder


def short(recipe, run, *overrides, resume=False):
    "A few steps of a recipe, with caches and tests as small as can be"
    small = SHORT
    if recipe.startswith(("shapes-class", "adapter", "boxes", "new-class")):
        small += ("data.cache=32",)
    elif recipe.endswith(("-var", "-parti")):
        small += ("data.cache=32", "reading_pairs=4", "vocabulary_captions=200")
    if recipe == "text-pretraining":
        small += ("vocabulary_captions=200", "train.workers=0")
    if recipe in ("new-class", "own-msvq", "own-var"):
        small += (f"data.path={write_photos(run.parent/'green thing')}",)
    if recipe == "own-var":
        small += ("tokenizer=shapes-msvq",)
    return losses(train(recipe, run, small + overrides, resume=resume))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # of an A100; of a T4
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains(recipe, precision, tmp_path):
    found = short(recipe, tmp_path/"run", "train.compile=false", f"train.precision={precision}")
    assert len(found) == 4 and all(math.isfinite(x) for x in found)


@pytest.mark.parametrize("recipe", ["shapes-var", "emoji-msvq"])
def test_a_compiled_recipe_trains_alike(recipe, tmp_path):
    plain = short(recipe, tmp_path/"plain", "train.compile=false", "train.precision=32-true")
    fast = short(recipe, tmp_path/"fast", "train.compile=true", "train.precision=32-true")
    assert fast == pytest.approx(plain, rel=2e-2)


def test_the_gpu_trains_like_the_cpu(tmp_path, monkeypatch):
    there = short("shapes-var", tmp_path/"gpu", "train.compile=false", "train.precision=32-true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = short("shapes-var", tmp_path/"cpu", "train.compile=false", "train.precision=32-true")
    assert there == pytest.approx(here, rel=2e-2)


def test_a_resumed_training_goes_on(tmp_path):
    plain = ("train.compile=false", "train.precision=32-true", "train.save_every=2")
    whole = short("shapes-var", tmp_path/"whole", *plain)
    (tmp_path/"whole"/"last").write_text("step-2")
    again = short("shapes-var", tmp_path/"whole", *plain, resume=True)
    assert again == pytest.approx(whole, rel=1e-2)


@pytest.mark.parametrize("name", ["shapes-var", "digits-var"])
def test_images_are_those_of_the_cpu(name):
    prompts = ["a large red circle on a gray background", "a blue star above a yellow ring"]
    if name == "digits-var":
        prompts = ["three", "seven"]
    drawn = [t2i.load(name, device)(prompts, num_images_per_prompt=8, seed=1).images
             for device in ("cpu", "cuda")]
    distances = [abs(np.subtract(x, y, dtype=int)).max() for x, y in zip(*drawn, strict=True)]
    assert np.mean(np.array(distances) <= 2) >= .5  # rounding tips a draw now and then


@pytest.mark.parametrize("name", ["shapes-msvq", "shapes-vqgan", "shapes-vit-vqgan"])
def test_tokens_are_those_of_the_cpu(name):
    tokenizer = load_tokenizer(bundled_folder(name))
    images = torch.stack([ShapesDataset()[i]["image"] for i in range(32)])
    ids = {}
    for device in ("cpu", "cuda"):
        found = tokenizer.to(device).encode(images.to(device))
        ids[device] = torch.cat(found, 1).cpu() if isinstance(found, list) else found.cpu()
    assert (ids["cpu"] == ids["cuda"]).float().mean() > .98  # convolutions in TF32


def test_features_of_a_clip_are_those_of_the_cpu():
    texts = ["a red circle", "two small green hearts on a gray background"]
    cpu, gpu = (load_clip(bundled_folder("shapes-clip"), d).encode_text(texts).cpu()
                for d in ("cpu", "cuda"))
    assert torch.allclose(cpu, gpu, atol=2e-3)
