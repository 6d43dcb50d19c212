"The recipes for your own captioned images: from a folder to a drawing, resumed; what is refused."
import pytest
from PIL import Image

import t2i
from t2i.core import T2IError
from t2i.data.shapes import render, sample_scene
from t2i.engine.recipes import load_recipe
from t2i.engine.runs import read_metrics
from t2i.training import train

SHORT = ("train.steps=2", "train.batch_size=4", "train.warmup=1", "train.val_every=0",
         "train.sample_every=0", "train.save_every=1", "train.log_every=1")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A working folder in which both commands of README have run for two steps"
    desk = tmp_path_factory.mktemp("desk")
    (desk/"my-images").mkdir()
    for i in range(8):
        scene = sample_scene(i, "single_object")
        Image.fromarray(render(scene)).save(desk/"my-images"/f"{i}.jpg")
        (desk/"my-images"/f"{i}.txt").write_text(scene.caption)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        for recipe in ("own-msvq", "own-var"):
            train(recipe, None, (*SHORT, "data.path=my-images", f"data.cache_dir={desk/'cache'}"))
    return desk


def test_two_short_commands_make_a_model_that_draws(desk):
    assert t2i.load(desk/"runs/own-var", "cpu")("a red circle", seed=0).images[0].size == (64, 64)


def test_the_tokenizer_starts_from_the_bundled_one(desk, tmp_path):
    first = read_metrics(desk/"runs/own-msvq")[0]["reconstruction"]
    fields = (*SHORT, f"data.path={desk/'my-images'}", "train.init_from=null", "train.steps=1")
    anew = read_metrics(train("own-msvq", tmp_path/"run", fields))[0]["reconstruction"]
    assert first < anew/2


def test_the_tokenizer_has_the_shape_of_the_bundled_one():
    ours, theirs = (load_recipe(name).config.model for name in ("own-msvq", "shapes-msvq"))
    assert ours == theirs


def test_a_stopped_training_goes_on(desk, monkeypatch):
    monkeypatch.chdir(desk)
    run = train("own-var", None, ("train.steps=3",), resume=True)
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("recipe, fields, says", [
    ("own-msvq", (), "needs data.path"),
    ("own-var", (), "t2i train own-msvq makes runs/own-msvq"),
    ("own-var", ("tokenizer=shapes-msvq",), "needs data.path"),
    ("own-var", ("tokenizer=shapes-msvq", "data.path=nowhere"), "no folder nowhere"),
])
def test_bad_input_is_one_line(recipe, fields, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((T2IError, OSError, ValueError), match=says) as e:
        train(recipe, tmp_path/"run", (*SHORT, *fields))
    assert "\n" not in str(e.value)
