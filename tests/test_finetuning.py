"Fine-tuning of class-conditional models on folders of images."
import json
import shutil

import pytest

import t2i
from house import root
from t2i.core import T2IError
from t2i.engine.recipes import load_recipe
from t2i.generators.finetuning import FinetuningTask, known_names
from t2i.training import load_task, train

SAMPLE = root/"data"/"sample"/"jsonl"
SHORT = ("train.steps=2", "train.batch_size=2", "train.warmup=0", "train.save_every=2",
         "train.val_every=2", "train.sample_every=0", "train.precision=32")


@pytest.fixture
def folders(tmp_path):
    "Images of two classes, of which shapes-class-var knows one"
    for i, path in enumerate(sorted(SAMPLE.glob("*.png"))[:8]):
        folder = tmp_path/"images"/("circle", "red_fox")[i%2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return f"data.path={tmp_path/'images'}"


def test_a_class_conditional_model_learns_a_class(tmp_path, folders):
    run = train("var-finetune", tmp_path/"run", ("finetune=shapes-class-var", folders, *SHORT))
    task = load_task(run)
    assert isinstance(task, FinetuningTask)
    assert task.config.tokenizer == "shapes-msvq" and task.config.sample_guidance == 2.5
    known = known_names(root/"t2i"/"pretrained"/"shapes-class-var")
    assert task.classes.names == [*known, "red fox"]
    assert task.model.config.num_classes == 9 and task.model.config.shared_adaln
    assert task.classes(["circle", "Red-Fox"])[0].tolist() == [known.index("circle"), 8]
    further = train("var-finetune", tmp_path/"two", (f"finetune={run}", folders, *SHORT))
    assert load_task(further).classes.names == task.classes.names


def test_a_run_on_folders_is_fine_tuned_with_its_own_names(tmp_path, folders):
    small = ("model.depth=1", "model.width=32", "model.heads=2", "start=null", "data.name=folder",
             "data.cache=0", "train.optimizer=adamw", folders, *SHORT)
    start = train("shapes-class-var", tmp_path/"start", small)
    (tmp_path/"images"/"wolf").mkdir()
    for path in (tmp_path/"images"/"circle").iterdir():
        shutil.copy(path, tmp_path/"images"/"wolf")
    shutil.copytree(tmp_path/"images", tmp_path/"more")
    shutil.rmtree(tmp_path/"images"/"wolf")
    more = f"data.path={tmp_path/'more'}"
    run = train("var-finetune", tmp_path/"run", (f"finetune={start}", more, *SHORT))
    assert load_task(run).classes.names == ["circle", "red_fox", "wolf"]
    about = json.loads((run/"generator.json").read_text())
    assert (about["depth"], about["num_classes"]) == (1, 3)


def test_a_class_run_keeps_its_names_and_draws_without_its_images(tmp_path, folders):
    small = ("model.depth=1", "model.width=32", "model.heads=2", "start=null", "data.name=folder",
             "data.cache=0", "train.optimizer=adamw", folders, *SHORT)
    run = train("shapes-class-var", tmp_path/"run", small)
    (tmp_path/"images"/"circle").rename(tmp_path/"images"/"zebra")
    with pytest.raises(T2IError, match=r"other classes than .*\(circle, zebra\).*finetune="):
        train("shapes-class-var", tmp_path/"run", (*small, "train.steps=4"), resume=True)
    (tmp_path/"images").rename(tmp_path/"elsewhere")
    assert t2i.load(run, "cpu").text_tokenizer.names == ["circle", "red_fox"]


def test_runs_that_stand_on_others_load_from_any_folder(tmp_path, folders, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = (*SHORT, "train.val_batches=1", "data.cache=0")
    shutil.copytree(root/"t2i"/"pretrained"/"shapes-msvq", tmp_path/"tokens")
    small = ("model.depth=1", "model.width=32", "model.heads=2", "train.optimizer=adamw")
    images, base = ("data.name=folder", folders, *short), "base=runs/start"
    trained = dict(
        start=("shapes-class-var", *small, "start=null", *images),
        lora=("lora-folder", base, *images),
        word=("new-class", base, "name=vixen", *images),
        added=("shapes-clip-var", f"model.{base}", *small, "read_ahead=false", *short),
        large=("shapes-sr4", "tokenizer=tokens", "model.blocks=1", *short))
    for name, (recipe, *fields) in trained.items():
        train(recipe, f"runs/{name}", (*fields, "train.compile=false"))
    (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path/"elsewhere")
    for name in trained:
        t2i.load(tmp_path/"runs"/name, "cpu")
    (tmp_path/"runs"/"start").rename("start")
    with pytest.raises(T2IError, match="the base model of .*lora is gone from .*start: put it"):
        t2i.load(tmp_path/"runs"/"lora", "cpu")


@pytest.mark.parametrize("name, task", [
    ("shapes-lora", "LoRATask"), ("shapes-adapter", "AdapterTask"), ("shapes-boxes", "BoxTask"),
    ("shapes-parti", "PartiTask"), ("shapes-clip", "CLIPTask"), ("shapes-msvq", "TokenizerTask"),
])
def test_a_model_of_another_kind_is_refused(name, task):
    with pytest.raises(T2IError, match=f"finetune={name}: .*{task}, has no .*init_from={name}"):
        load_recipe("var-finetune", (f"finetune={name}",))
