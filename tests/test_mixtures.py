"Several datasets in one recipe: exact order and resume, shares, scores per source, clear errors."
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
from t2i import cli
from t2i.catalog import describe_run
from t2i.core import T2IError
from t2i.data import mixtures
from t2i.data.datasets import DataConfig, InfiniteDataset, load_dataset, stream_loader
from t2i.data.mixtures import Turns, load_mixture, read_sources
from t2i.engine.checkpoints import last_checkpoint
from t2i.engine.recipes import load_recipe, save_recipe
from t2i.engine.runs import read_metrics
from t2i.scoring import ScoreOptions, evaluate_model
from t2i.training import train

here = Path(__file__).resolve().parent
sample = here.parent/"data"/"sample"
SAMPLES = ["txt", "imagefolder", "coco"]  # three layouts of users
RECIPE = f"""
task: t2i.generators.text_training.TextVARTask
tokenizer: digits-msvq
model: {{depth: 1, width: 32, heads: 2}}
text: {{depth: 1, width: 32, heads: 2}}
vocabulary_captions: 60
reading_pairs: 0
contrast: {{weight: 0.05}}
data:
  name: mixture
  sources:
    - {{path: {sample}/txt, weight: 3}}
    - {{path: {sample}/imagefolder, augment: flip, label: photos}}
    - {{path: {sample}/coco, captions: one}}
    - {{name: emoji, weight: 2}}
  resolution: 32
train:
  steps: 6
  batch_size: 8
  precision: 32-true
  warmup: 2
  log_every: 1
  val_every: 3
  val_batches: 1
  sample_every: 0
  save_every: 2
"""
LABELS = ["txt", "photos", "coco", "emoji"]
SHARES = [3/7, 1/7, 1/7, 2/7]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path/"recipe.yaml").write_text(RECIPE)
    return tmp_path/"recipe.yaml"


def config(*sources, **fields):
    return DataConfig("mixture", sources=list(sources), **fields)


# ---- Training


KILLED = """
import signal, sys
from pathlib import Path
import faults
folder = Path(sys.argv[1])
assert faults.child(folder, "whole", False) == 0
for step in (3, 5):
    ended = faults.child(folder, "killed", step > 3, lambda: faults.die_after(step))
    assert ended == -signal.SIGKILL
assert faults.child(folder, "killed", True) == 0
"""


def test_killed_and_resumed_equals_undisturbed(recipe, tmp_path):
    ended = processes.run("-c", KILLED, tmp_path)
    assert ended.returncode == 0, ended.stderr
    steps = [last_checkpoint(tmp_path/run) for run in ("whole", "killed")]
    assert [step.name for step in steps] == ["step-6"]*2
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = (load_file(step/name) for step in steps)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    lines = [read_metrics(tmp_path/run) for run in ("whole", "killed")]
    for line in lines[0] + lines[1]:
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]
    validations = [line for line in lines[0] if "val_loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    for name in ("loss", "accuracy"):  # per source, and their mean by the shares
        for line in validations:
            parts = [line[f"val_{name}/{label}"] for label in LABELS]
            assert len(set(parts)) > 1
            mean = sum(share*part for share, part in zip(SHARES, parts))
            assert math.isclose(line[f"val_{name}"], mean, rel_tol=1e-6)
    about = describe_run(tmp_path/"whole")
    assert about["data"] == "txt 42.9%, photos 14.3%, coco 14.3%, emoji 28.6%"
    scores = evaluate_model(str(tmp_path/"whole"), options=ScoreOptions(count=4))
    assert scores["benchmark"] == "captions" and scores["data"] == f"{about['data']}, held out"


@pytest.mark.parametrize("name, more", [
    ("shapes-msvq", ["model.channels=32"]),
    ("shapes-vqgan", ["model.channels=32", "discriminator.channels=32", "train.accumulate=1"]),
    ("shapes-clip", ["model.depth=1"]),
    ("shapes-parti", ["model.depth=1", "text.depth=1", "reading_pairs=2"]),
    ("shapes-var", ["model.depth=1", "reading_pairs=2", "sample_num_steps=1"]),
])
def test_every_kind_of_model_trains_on_a_mixture(tmp_path, name, more):
    sources = [dict(path=str(sample/layout)) for layout in SAMPLES] + [dict(name="shapes")]
    few = ["train.steps=2", "train.batch_size=4", "train.val_batches=1", "train.compile=false",
           "train.workers=0", "data.cache=0", "train.precision=32-true", "train.sample_every=0",
           f"data.sources={json.dumps(sources)}"]
    if "vqgan" not in name and "msvq" not in name:
        few.append("vocabulary_captions=40")
    run = train(name, tmp_path/"run", (*few, *more))
    last = read_metrics(run)[-1]
    names = {key.partition("/")[2] for key in last if key.startswith("val_loss/")}
    assert names == {"txt", "imagefolder", "coco", "shapes"} and "val_loss" in last


def test_each_source_is_read_once(recipe, monkeypatch):
    config = load_recipe(recipe).config.data
    read, numbers = mixtures.read_source, []
    monkeypatch.setattr(mixtures, "read_source", lambda *a: numbers.append(a[1]) or read(*a))
    assert list(load_mixture(config).shares) == LABELS
    assert numbers == [0, 1, 2, 3]


def test_tokens_are_cached_per_source(recipe, tmp_path):
    few = ["train.steps=1", "data.cache=6", f"data.cache_dir={tmp_path}/cache",
           "data.sources.1.augment=none"]
    run = train(recipe, tmp_path/"run", (*few, "data.sources.0.weight=1"))
    assert "val_loss/txt" in read_metrics(run)[-1]
    shards = sorted((tmp_path/"cache").rglob("*.safetensors"))
    assert [shard.relative_to(tmp_path/"cache").parts[:2] for shard in shards] == [
        (label, "tokens") for label in sorted(LABELS)]
    times = [shard.stat().st_mtime_ns for shard in shards]
    train(recipe, tmp_path/"again", (*few, "data.sources.0.weight=9"))  # nothing is encoded anew
    assert [shard.stat().st_mtime_ns for shard in shards] == times
    with pytest.raises(T2IError, match=r"sources.1: .* needs data.augment=none"):
        train(recipe, tmp_path/"refused", tuple(few[:2]))


def test_text_features_of_a_mixture_are_kept(tmp_path, monkeypatch):
    "Of sources that end; with one that does not, the CLIP reads captions as they come"
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))
    few = ["train.steps=1", "train.batch_size=4", "train.val_batches=1", "train.sample_every=0",
           "train.compile=false", "train.workers=0", "data.cache=0", "train.precision=32-true",
           "model.depth=1", "model.width=32", "model.heads=2", "start=null", "gallery=null"]
    files = [dict(path=str(sample/layout)) for layout in SAMPLES]
    for name, more, kept in (("files", [], 1), ("endless", [dict(name="shapes")], 0)):
        home = tmp_path/"home"/name
        monkeypatch.setenv("T2I_HOME", str(home))
        task = "t2i.generators.var_with_clip.ClipVARTask"
        (tmp_path/"recipe.yaml").write_text(f"task: {task}\ntokenizer: shapes-msvq\n")
        train(tmp_path/"recipe.yaml", tmp_path/name,
              (*few, f"data.sources={json.dumps(files + more)}"))
        assert len(list(home.glob("cache/text-*"))) == kept


# ---- The order


def test_any_batch_size_and_workers_give_the_same_images():
    data = load_dataset(config(dict(path=str(sample/"coco"), augment="crop"), dict(name="shapes")))
    whole = next(iter(stream_loader(InfiniteDataset(data, 7), 12, range(1))))
    small = list(stream_loader(InfiniteDataset(data, 7), 4, range(3), workers=2))
    for name in ("image", "source", "u"):
        assert torch.equal(whole[name], torch.cat([batch[name] for batch in small]))
    assert whole["caption"] == [caption for batch in small for caption in batch["caption"]]
    late = InfiniteDataset(data, 7)  # a new process, which begins in the middle
    assert torch.equal(late[11]["image"], whole["image"][11])


@pytest.mark.parametrize("weights", [[1], [1, 1], [5, .5, 2], [1e-3, 1e3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_and_turns(weights, seed):
    turns, n = Turns(weights, seed), 3*4096
    drawn = torch.cat([turns.block(b) for b in range(3)])
    for source, weight in enumerate(weights):
        share = weight/sum(weights)
        count = int((drawn == source).sum())
        assert abs(count - n*share) <= 4*math.sqrt(n*share*(1-share)) + 1
        places = [turns(p)[1] for p in range(0, n, 5) if drawn[p] == source]
        slow = [int((drawn[:p] == source).sum()) for p in range(0, n, 5) if drawn[p] == source]
        assert places == slow


def test_a_source_has_true_epochs():
    data = load_dataset(config(dict(path=str(sample/"txt")), dict(name="shapes", weight=3)))
    stream, count = InfiniteDataset(data, 3), len(data.parts["txt"])
    seen = [item["caption"] for item in map(stream.__getitem__, range(150)) if not item["source"]]
    own = {data.parts["txt"].caption(i) for i in range(count)}
    assert len(seen) > 2*count
    for start in range(0, len(seen)-count, count):
        assert set(seen[start:start+count]) == own


# ---- Recipes


def test_overrides_and_the_saved_recipe(recipe, tmp_path):
    found = load_recipe(recipe, ("data.sources.0.weight=2", "data.sources.1.label=007"))
    sources = read_sources(found.config.data)
    assert [source.weight for source in sources] == [2, 1, 1, 2]
    assert [source.label for source in sources] == ["txt", "007", "coco", "emoji"]
    save_recipe(found, tmp_path)
    assert load_recipe(tmp_path/"recipe.yaml").config == found.config
    with pytest.raises(T2IError, match="no item of this number"):
        load_recipe(tmp_path/"recipe.yaml", ("data.sources.4.weight=2",))


@pytest.mark.parametrize("change, says", [
    ("data.sources=[]", "data.name=mixture needs data.sources"),
    ("data.sources.1.weight=0", "data.sources.1: weight is 0; it must be a number above 0"),
    ("data.sources.1.weight=-2", "data.sources.1: weight is -2"),
    ("data.sources.1.weight=nan", "data.sources.1: weight is nan"),
    ("data.sources.1.weight=much", "data.sources.1: 'much' is not of type Float"),
    ("data.sources.1.wait=2", "data.sources.1: there is no field wait"),
    ("data.sources.0.path=nowhere", "data.sources.0 (nowhere): no folder nowhere"),
    ("data.sources.2={name: mixture}", "data.sources.2 is a mixture"),
    ("data.sources.2={sources: [{name: shapes}]}", "data.sources.2 is a mixture"),
    ("data.sources.2={name: digit}", "data.sources.2 (digit): unknown data.name 'digit'"),
    ("data.sources.2={name: coco}", "data.sources.2 (coco): data.name=coco needs data.path"),
    ("data.sources.2.captions=two", "data.sources.2: data.captions is one of"),
    ("data.sources.2.resolution=64", "data.sources.2.resolution: all sources have the same"),
    ("data.sources.2={weight: 2}", "data.sources.2 has neither a name nor a path"),
    ("data.sources.2.label=txt", "data.sources.2: two sources are called txt"),
    ("data.sources.3.name=shapes", "a mixture needs images of one size"),
    ("data.path=photos", "data.path belongs to a source"),
    ("data.augment=flip", "data.augment belongs to a source"),
    ("data.name=folder", "data.sources needs data.name=mixture"),
])
def test_a_mistake_is_one_line_that_names_the_source(recipe, change, says):
    with pytest.raises(ValueError) as caught:
        load_mixture(load_recipe(recipe, (change,)).config.data)
    text = str(caught.value)
    assert "\n" not in text
    assert says in text


@pytest.mark.parametrize("recipe, says", [
    ("shapes-class-var", "data.name=mixture has no classes"),
    ("adapter-shapes", "data.name=mixture has no classes"),
    ("var-finetune", "fine-tuning reads the classes of one folder"),
    ("boxes-shapes", "data.sources needs data.name=mixture"),
])
def test_tasks_that_need_one_dataset_refuse(tmp_path, recipe, says):
    sources = "data.sources=[{name: shapes}, {name: emoji}]"
    names = [] if recipe == "boxes-shapes" else ["data.name=mixture", "data.path=null"]
    finetune = ["finetune=var-d16"] if recipe == "var-finetune" else []  # nothing is fetched
    with pytest.raises(ValueError, match=says):
        train(recipe, tmp_path/"run", (*finetune, *names, sources))


def test_a_source_without_captions_serves_a_tokenizer_alone(tmp_path):
    (tmp_path/"bare").mkdir()
    for path in (sample/"txt").glob("*.png"):
        (tmp_path/"bare"/path.name).write_bytes(path.read_bytes())
    data = config(dict(path=str(tmp_path/"bare")), dict(name="shapes"))
    with pytest.raises(T2IError, match=r"data.sources.0 \(bare\): no captioned image"):
        load_dataset(data)
    assert load_dataset(data, captioned=False)[0]["image"].shape == (3, 64, 64)


def test_the_command_checks_a_recipe(recipe, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["t2i", "data", "check", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    code, out, _ = run(recipe, "train.steps=49", "train.batch_size=10")
    assert code == 0 and "42.9%" in out and "endless" in out
    _, out, _ = run(recipe, "train.steps=49", "train.batch_size=10", "--json")
    rows = json.loads(out)["sources"]
    assert [row["source"] for row in rows] == LABELS
    assert [row["train"] for row in rows] == [7, 7, 8, None]
    assert [row["val"] for row in rows] == [1, 1, 4, None]
    assert [row["visits"] for row in rows][:3] == [30, 10, 8.8]
    code, out, err = run(recipe, "data.sources.1.path=nowhere")
    assert code == 1 and "data.sources.1 (photos): no folder nowhere" in err + out
