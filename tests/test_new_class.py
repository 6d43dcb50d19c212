"A new class: a run, what it draws and saves, and what is refused."
import numpy as np
import pytest
import torch
from PIL import Image

import t2i
from t2i.core import T2IError
from t2i.data.shapes import render, sample_scene
from t2i.training import train

SHORT = ("train.steps=2", "train.batch_size=4", "train.warmup=1", "train.val_every=0",
         "train.sample_every=2", "train.save_every=0")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")/"green_thing"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(render(sample_scene(i, "single_object"))).save(folder/f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("runs")/"new"
    return train("new-class", folder, (*SHORT, f"data.path={photos}"))


def test_the_new_class_is_drawn_by_its_name_and_others_as_before(run):
    pipe, base = t2i.load(run, "cpu"), t2i.load("shapes-class-var", "cpu")
    settings = dict(seed=3, guidance_scale=2., temperature=.8, output_type="pt")
    assert pipe("Green thing", **settings).images.shape == (1, 3, 64, 64)
    assert torch.equal(pipe("heart", **settings).images, base("heart", **settings).images)
    settings |= dict(temperature_schedule="ramp", more_smooth=True)
    assert torch.equal(pipe("heart", **settings).images, base("heart", **settings).images)
    with pytest.raises(T2IError, match="no class 'pink thing'"):
        pipe("pink thing")


def test_a_few_kilobytes_are_saved(run, tmp_path):
    pipe = t2i.load(run, "cpu")
    pipe.save_pretrained(tmp_path/"m")
    files = {str(p.relative_to(tmp_path/"m")): p.stat().st_size
             for p in (tmp_path/"m").rglob("*") if p.is_file()}
    assert set(files) == {"model_index.json", "generator/config.json",
                          "generator/model.safetensors", "text_tokenizer/classes.json"}
    assert sum(files.values()) < 5000
    saved = t2i.load(tmp_path/"m", "cpu")
    assert saved.text_tokenizer.names[-1] == "green thing" and saved.defaults == pipe.defaults
    assert torch.equal(saved.generator.vector, pipe.generator.vector.half().float())


def test_what_a_run_logs_is_what_it_draws(run):
    logged = np.asarray(Image.open(run/"samples"/"step-2.png").convert("RGB"))
    first = t2i.load(run, "cpu")("green thing", 16, seed=0).images[0]
    assert np.array_equal(logged[:64,:64], np.asarray(first))


@pytest.mark.parametrize("override, says", [
    ("name=Heart", "has a class 'Heart' already"),
    ("start=hart", "no class 'hart'"),
    ("data.path=nowhere", "no folder"),
])
def test_bad_input_is_one_line(tmp_path, photos, override, says):
    with pytest.raises((T2IError, OSError), match=says) as e:
        train("new-class", tmp_path/"run", (*SHORT, f"data.path={photos}", override))
    assert "\n" not in str(e.value)
