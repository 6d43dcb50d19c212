"Adapters: a run and what it logs, saving, other parts are refused, the bundled one."
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import t2i
from t2i.cli import app
from t2i.control import adapter
from t2i.core import T2IError, fold_in, image_grid
from t2i.engine.checkpoints import initial_weights
from t2i.engine.files import bundled_folder
from t2i.engine.recipes import load_recipe
from t2i.generators.var_training import attribute_scores, object_prompts
from t2i.outputs import read_about
from t2i.training import train

SHORT = ("train.steps=2", "train.batch_size=4", "train.warmup=1", "data.cache=0",
         "train.val_batches=1", "train.val_every=0", "train.sample_every=0", "train.save_every=0")


@pytest.fixture(scope="module")
def pipe():
    return t2i.load("shapes-adapter", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"adapter"
    return train("adapter-shapes", folder, (*SHORT, "adapter.hidden=32"))


def test_what_a_run_logs_is_what_it_draws(run):
    logged = run/"samples"/"step-2.png"
    about = read_about(logged)
    captions = about["captions"].split("\n")
    images = t2i.load(run, "cpu")(captions, seed=0).images
    image = Image.open(logged).convert("RGB")
    assert np.array_equal(np.asarray(image), np.asarray(image_grid(images)))


def test_known_labels_are_not_searched_for(run, monkeypatch):
    recipe = load_recipe(run/"recipe.yaml")
    task = recipe.task(recipe.config)
    monkeypatch.setattr(adapter, "find_class", None)
    text = task.read(["a red circle", "a star"], torch.tensor([5, 0]))
    assert text.labels.tolist() == [5, 0] and len(text.features.pooled) == 2
    with pytest.raises(TypeError):                               # without labels, it is
        task.read(["a red circle"])


def test_only_the_adapter_is_saved(run, tmp_path):
    pipe = t2i.load(run, "cpu")
    pipe.save_pretrained(tmp_path/"m")
    files = {str(p.relative_to(tmp_path/"m")) for p in (tmp_path/"m").rglob("*") if p.is_file()}
    assert files == {"model_index.json", "generator/config.json", "generator/model.safetensors",
                     "text_tokenizer/classes.json"}
    assert sum(p.stat().st_size for p in run.rglob("model.safetensors")) < 1e6
    prompt = "a small blue ring"
    saved = t2i.load(tmp_path/"m", "cpu")
    assert saved.defaults == pipe.defaults
    own = pipe.generator.state_dict()
    for name, weight in saved.generator.state_dict().items():
        assert torch.equal(weight, own[name].half().float()), name
    assert saved(prompt, seed=1).images[0].size == (64, 64)


@pytest.mark.parametrize("field, value, says", [
    ("clip_fingerprint", "0"*16, "another CLIP"),
    ("base_fingerprint", "0"*16, "another model"),
    ("width", 64, "width 64"),
])
def test_other_parts_are_refused(tmp_path, field, value, says):
    shutil.copytree(bundled_folder("shapes-adapter"), tmp_path/"m")
    path = tmp_path/"m"/"generator"/"config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(T2IError, match=says):
        t2i.load(tmp_path/"m", "cpu")


@pytest.mark.parametrize("name", ["shapes-adapter", "shapes-class-var"])
def test_training_starts_from_a_saved_pipeline_or_its_generator(name):
    model = t2i.load(name, "cpu").generator
    for source in (name, f"{name}/generator"):
        weights = initial_weights(source, model)
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(w.float(), model.state_dict()[k]) for k, w in weights.items())


def test_class_alone_is_the_class_conditional_model(pipe):
    base = t2i.load("shapes-class-var", "cpu")
    seeds = [fold_in(3, i) for i in range(2)]
    settings = dict(guidance_scale=2., temperature=.8, output_type="pt")
    ours = pipe(["a red star", "a tiny... ring!"], generator=seeds, alpha=1, beta=0, **settings)
    seeds = [fold_in(3, i) for i in range(2)]
    assert torch.equal(ours.images, base(["star", "ring"], generator=seeds, **settings).images)


def test_weights_are_checked_and_recorded(pipe):
    for wrong in (dict(alpha=0, beta=0), dict(alpha=[1, 2]), dict(beta="much"), dict(alpha=-1)):
        with pytest.raises(T2IError, match="alpha|beta|maps"):
            pipe("a red star", seed=0, **wrong)
    out = pipe("a red star", seed=0, alpha=[1, 1, 1, 1, 1, .5])
    assert out.settings["alpha"] == [1, 1, 1, 1, 1, .5]
    assert out.settings["beta"] == pipe.defaults["beta"]
    for name, weight in (("alpha", .5), ("alpha", 1.), ("beta", 1.)):
        with pytest.raises(T2IError, match=f"no setting {name}"):
            t2i.load("shapes-class-var", "cpu")("star", **{name: weight})
    with pytest.raises(T2IError, match="cannot edit"):
        pipe.edit(out.images[0], out.images[0], "a star")


def test_the_bundled_adapter_brings_color_and_size(pipe):
    prompts = object_prompts(40, seed=9)

    def scores(**weights):
        seeds = [fold_in(9, i) for i in range(len(prompts))]
        return attribute_scores(pipe(prompts, generator=seeds, **weights).images, prompts)

    alone, both = scores(beta=0), scores()
    assert alone["color"] < .35 and both["color"] > .7
    assert both["shape"] > alone["shape"] - .15


def test_a_sweep_from_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = ["sweep", "shapes-adapter", "alpha=0,1", "beta=0,1", "--count", "4", "--json"]
    result = CliRunner().invoke(app, sweep)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output.splitlines()[-1])
    assert len(found["rows"]) == 3 and found["best"] in found["rows"]
    grid = Image.open(tmp_path/"sweep.png")
    assert grid.text["prompt"].splitlines() == found["cell"] and len(found["cell"]) == 4
    wrong = CliRunner().invoke(app, ["sweep", "shapes-adapter", "gamma=1"])
    assert "'gamma=1' is no axis" in str(wrong.exception)


def test_sheets_of_samples_read_the_held_out_images_once(run, monkeypatch):
    recipe = load_recipe(run/"recipe.yaml")
    task = recipe.task(recipe.config)
    asked = []
    images = task.images
    monkeypatch.setattr(task, "images", lambda split: asked.append(split) or images(split))
    first = task.sample_captions()
    assert task.sample_captions() == first == [images("val").caption(i) for i in range(16)]
    assert asked == ["val"]
