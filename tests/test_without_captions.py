"Adapters that learn from images alone: runs on folders and shapes, and what is refused."
import pytest
import torch
from PIL import Image

import t2i
from t2i.core import T2IError
from t2i.data.shapes import SHAPES, render, sample_scene
from t2i.engine.recipes import load_recipe
from t2i.training import load_task, train

SHORT = ("train.steps=2", "train.batch_size=4", "train.warmup=1", "adapter.hidden=32",
         "train.val_batches=1", "train.val_every=2", "train.sample_every=2", "train.save_every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(16):
        scene = sample_scene(i, "single_object")
        place = root/(scene.objects[0].shape if i % 2 else "others")
        place.mkdir(exist_ok=True)
        Image.fromarray(render(scene)).save(place/f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder):
    kept = tmp_path_factory.mktemp("kept")
    return train("adapter-shapes-images", kept/"run",
                 (*SHORT, f"data.path={folder}", f"data.cache_dir={kept/'cache'}"))


def test_a_folder_without_captions_trains_and_draws(run):
    pipe = t2i.load(run, "cpu")
    assert pipe.text_tokenizer.names == list(SHAPES)
    assert pipe.generator.config.kind == "mlp"
    assert pipe("a small blue ring", seed=0).images[0].size == (64, 64)
    assert (run/"samples"/"step-2.png").is_file()


def test_captions_are_not_looked_at(tmp_path):
    task = load_recipe("adapter-shapes-images", ("data.cache=0",))
    task = task.task(task.config)
    task.prepare(torch.device("cpu"))
    items = [task.dataset("train").told(i) for i in range(4)]
    batch = dict(vector=torch.randn(4, 64), u=torch.tensor([0., .9, .9, .9]),
                 label=torch.tensor([item["label"] for item in items]))
    read = task.condition(batch | dict(caption=["never read"]*4))
    assert torch.equal(read.features.pooled[0], task.empty[0])
    assert read.labels.tolist() == [8, *batch["label"][1:].tolist()]
    assert torch.equal(read.features.pooled, task.condition(batch).features.pooled)


def test_vectors_from_the_cache_are_those_of_the_images(run):
    task = load_task(run)
    task.prepare(torch.device("cpu"))
    items = [task.dataset("train")[i] for i in range(3)]
    images = torch.stack([task.images("train")[i]["image"] for i in range(3)])
    kept = torch.stack([item["vector"] for item in items])
    assert torch.allclose(kept, task.clip.encode_image(images), atol=1e-3)


@pytest.mark.parametrize("override, says", [
    ("adapter.kind=cross", "must be mlp"),
    ("noise=-1", "0 or more"),
    ("data.path=nowhere", "no folder"),
])
def test_bad_input_is_one_line(tmp_path, override, says):
    with pytest.raises((T2IError, ValueError, OSError), match=says) as e:
        train("adapter-shapes-images", tmp_path/"run", (*SHORT, override))
    assert "\n" not in str(e.value)
