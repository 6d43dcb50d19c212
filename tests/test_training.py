"Exact resume after kills, several processes, full disks, bad recipes."
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._inductor import config as inductor_config
from torch.optim import _muon

import processes
import t2i
import tiny
from t2i.core import T2IError, fold_in
from t2i.engine.checkpoints import last_checkpoint
from t2i.engine.recipes import load_recipe
from t2i.engine.runs import read_metrics
from t2i.tokenizers.soft_codes import GumbelCodebook, start_codes
from t2i.training import train

here = Path(__file__).resolve().parent
RECIPE = """
task: t2i.tokenizers.training.TokenizerTask
model:
  resolution: 32
  scales: [1, 2, 4]
  codebook_size: 32
  code_dim: 4
  channels: 32
  multipliers: [1, 2]
  blocks: 1
  attention: false
  patch: 4
data: {name: digits}
train:
  steps: 12
  batch_size: 8
  precision: 32-true
  warmup: 3
  log_every: 1
  val_every: 0
  val_batches: 1
  sample_every: 0
  save_every: 0
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path/"tiny.yaml").write_text(RECIPE)
    return tmp_path/"tiny.yaml"


# ---- Killed and resumed


def timeless(run):
    "The metrics without the speed"
    lines = read_metrics(run)
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def assert_same_state(a, b):
    "Two training states are equal to the last bit"
    assert a.keys() == b.keys() and a["step"] == b["step"]
    for kind, states in a["optimizers"].items():
        assert states.keys() == b["optimizers"][kind].keys()
        for name, state in states.items():
            for k, v in state.items():
                assert torch.equal(v, b["optimizers"][kind][name][k]), (name, k)
    for one, other in zip(a["random"], b["random"], strict=True):
        assert torch.equal(one["cpu"], other["cpu"])
    for name, weight in a["discriminator"].items():
        assert torch.equal(weight, b["discriminator"][name]), name


def test_a_recipe_is_kept_as_the_config_settled_it():
    recipe = load_recipe("shapes-msvq", (f"data.path={here.parent/'data'/'sample'/'txt'}",))
    assert recipe.config.data.name == recipe.tree["data"]["name"] == "folder"
    assert load_recipe("shapes-msvq").tree["data"]["name"] == "shapes"



def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    ended = processes.run(here/"faults.py", tmp_path)
    assert ended.returncode == 0, ended.stderr
    a, b = (last_checkpoint(tmp_path/run) for run in ("whole", "killed"))
    assert a.name == b.name == "step-12"
    for name in ("model.safetensors", "ema.safetensors"):
        x, y = load_file(a/name), load_file(b/name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    assert_same_state(*(torch.load(p/"state.pt", weights_only=True) for p in (a, b)))
    lines = timeless(tmp_path/"whole")
    assert lines == timeless(tmp_path/"killed")  # every step once, in order
    assert [line["step"] for line in lines if "val_loss" in line] == [6, 12]
    assert not list((tmp_path/"killed").rglob("*.tmp"))


def test_a_signal_to_all_processes_stops_between_steps(recipe, tmp_path):
    "As a cluster sends it: to the training and to the workers that load its data"
    code = "import os; from t2i.cli import main; os.setsid(); main()"
    words = ["train", recipe, "-o", tmp_path/"run", "train.steps=100000", "train.workers=2"]
    log = tmp_path/"log.txt"
    log.touch()
    process = processes.start("-c", code, *words, stderr=log)
    processes.wait_for("step 2 of", process, log)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 130 and "go on with --resume" in log.read_text(), log.read_text()
    assert last_checkpoint(tmp_path/"run").name != "step-0"


def break_step(monkeypatch, number=None):
    "From now on a step raises; before, the signal comes"
    def train_step(state, data):
        next(data)
        if number:
            signal.raise_signal(number)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(t2i.training, "train_step", train_step)


@pytest.mark.parametrize("name", [None, "SIGINT", "SIGTERM"])
def test_a_step_that_breaks_leaves_no_worker_behind(recipe, tmp_path, monkeypatch, name):
    "They ignore signals, so that Python would wait for them for ever"
    break_step(monkeypatch, name and getattr(signal, name))
    said = "stopped within step 1; nothing is saved" if name else "the compiler was killed"
    with pytest.raises(T2IError if name else RuntimeError, match=said) as caught:
        train(recipe, tmp_path/"run", ("train.workers=1",))
    assert caught.tb and not multiprocessing.active_children()  # while frames are kept, as at exit


def test_a_step_that_breaks_after_a_checkpoint(recipe, tmp_path, monkeypatch):
    train(recipe, tmp_path/"run", ("train.steps=2", "train.val_every=0"))
    break_step(monkeypatch, signal.SIGINT)
    with pytest.raises(T2IError, match="stopped within step 3; --resume goes on from step 2"):
        train(recipe, tmp_path/"run", ("train.steps=4",), resume=True)


def test_without_a_compiler_the_remedy_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path/"cache"))
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(T2IError, match="train.compile=false trains without it"):
            train(recipe, tmp_path/"run", ("train.compile=true",))


# ---- Two processes equal one

# under hinge, the last bias starts with a gradient of exactly 0, which AdamW turns into a step of
# either sign
GAN = """
    model.ema_decay=null adversarial=0.8 feature_matching=1 discriminator.channels=32
    discriminator.layers=2 discriminator.start=2 discriminator.warmup=4
    discriminator.loss=non_saturating
""".split()
CLIP = """
    data.name=digits attack=2 model.image_size=32 train.steps=12 train.batch_size=16 train.warmup=3
    train.precision=32-true train.log_every=1 train.val_every=0 train.val_batches=1
    train.save_every=0 train.workers=0
""".split()
GENERATOR = """
    train.steps=12 train.batch_size=8 train.warmup=3 train.precision=32-true train.log_every=1
    train.val_batches=1 train.sample_every=0 data.cache=0
""".split()
MASKED = """
    first_scales_prob=0.5 first_scales_steps=0 label_smoothing_temperature=0
    contrast.strong_from=3 contrast.strong_until=6 contrast.strong_weight=0.2 reading_pairs=3
    model.depth=2 train.compile=false train.workers=0 data.cache=40 vocabulary_captions=500
    sample_num_steps=1
""".split()
PARTI = """
    contrast.strong_from=3 contrast.strong_until=6 reading_pairs=3 model.depth=2
    train.compile=false train.workers=0 vocabulary_captions=500
""".split()
DRAWN = """
    preference.captions=12 preference.candidates=3 preference.judge=clip preference.measured=0
    sample_num_steps=1 reading_pairs=0 vocabulary_captions=500 train.lr=3e-5 train.val_every=0
    train.save_every=0 train.batch_size=4
""".split()
ENLARGE = """
    train.steps=12 train.batch_size=8 train.warmup=3 train.precision=32-true train.log_every=1
    train.val_every=0 train.val_batches=1 train.sample_every=0 train.save_every=0 train.workers=0
    model.blocks=1 model.channels=8 tokenizer=null patch=8
""".split()
SAMPLE = here.parent/"data"/"sample"
SOURCES = [dict(path=f"{SAMPLE}/txt", augment="crop"), dict(path=f"{SAMPLE}/coco", captions="one"),
           dict(name="digits", weight=2)]
MIXED = ["data.name=mixture", "data.resolution=32", f"data.sources={json.dumps(SOURCES)}"]
LATE = ["model.ema_decay=null", "quantize_from=6"]
CASES = dict(
    averages=("tiny", 2, []),
    gradient=("tiny", 2, ["model.ema_decay=null"]),
    late=("tiny", 1, LATE),
    mixture=("tiny", 2, MIXED),
    adversarial=("tiny", 1, GAN),
    generator=("digits-var", 2, GENERATOR),
    masked=("shapes-var", 1, [*GENERATOR, *MASKED]),
    parti=("shapes-parti", 1, [*GENERATOR, *PARTI]),
    drawn=("shapes-preferences", 1, [*GENERATOR, *DRAWN]),
    enlarging=("shapes-sr4", 2, ENLARGE),
    contrastive=("shapes-clip", 1, CLIP),
)


def logged_losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def held_out(run):
    "The losses of the last validation"
    return [value for name, value in read_metrics(run)[-1].items() if name.startswith("val_loss")]


GROUPS = [list(CASES)[:6], list(CASES)[6:]]  # each starts its processes once


@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_two_processes_equal_one(recipe, tmp_path, names):
    script = here/"float64_muon.py"  # in bfloat16 a difference in the last bit would grow to 1e-3
    for side in ("one", "two"):
        trainings = []
        for name in names:
            source, accumulate, overrides = CASES[name]
            source = str(recipe) if source == "tiny" else source
            split = [f"train.accumulate={accumulate if side == 'two' else 1}"]
            trainings.append((source, str(tmp_path/side/name), [*overrides, *split]))
        (tmp_path/f"{side}.json").write_text(json.dumps(trainings))
        options = dict(T2I_HOME=str(tmp_path/f"home-{side}"))
        if side == "two":
            processes.torchrun(2, script, tmp_path/"two.json", **options)
            continue
        ended = processes.run(script, tmp_path/"one.json", **options)
        assert ended.returncode == 0, ended.stderr
    for name in names:
        one, two = (logged_losses(tmp_path/side/name) for side in ("one", "two"))
        assert len(one) == len(two) == 12
        if name == "mixture":  # the mean, and three sources
            one += held_out(tmp_path/"one"/name)
            two += held_out(tmp_path/"two"/name)
            assert len(one) == len(two) == 12 + 4
        off = [abs(a-b) for a, b in zip(one, two)]
        assert max(off) < 5e-4, (name, off)  # rounding alone


def test_shards_of_two_processes(tmp_path, monkeypatch):
    "Sharded equals whole; stopped and resumed in two processes or in one, it ends the same"
    processes.torchrun(2, here/"sharded.py", tmp_path)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", _muon._zeropower_via_newtonschulz)
    import float64_muon  # noqa: F401, undone after this test
    train(tiny.recipe(optimizer="muon", sharding="fsdp"), tmp_path/"alone", resume=True)
    states = {}
    for run in ("whole", "shards", "again", "alone"):
        step = last_checkpoint(tmp_path/run)
        assert step.name == "step-6"
        states[run] = load_file(step/"model.safetensors") | {
            f"ema.{k}": w for k, w in load_file(step/"ema.safetensors").items()}
        memory = torch.load(step/"state.pt", weights_only=True)["optimizers"]
        assert set(memory) == {"AdamW", "Muon"}
        for of in memory.values():
            states[run] |= {f"{n}.{k}": w for n, kept in of.items() for k, w in kept.items()}
    whole = states.pop("whole")
    for run, state in states.items():
        assert state.keys() == whole.keys() and len(whole) > 20
        off = {k: (w-whole[k]).abs().max().item() for k, w in state.items()}
        assert max(off.values()) < 1e-6, (run, off)  # sums in another order round otherwise
    assert all(torch.equal(w, states["again"][k]) for k, w in states["shards"].items())
    losses = [read_metrics(tmp_path/run)[-1]["val_loss"] for run in ("digits", "digits-whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (tmp_path/"digits"/"samples"/"step-2.png").is_file()
    image, = t2i.load(tmp_path/"digits")("a handwritten seven", seed=0).images
    assert image.size == (32, 32)


@pytest.mark.parametrize("source", ["shapes-var", "shapes-parti"])
def test_features_of_a_frozen_clip_pass_mixed_precision(source, tmp_path):
    "Fabric copies what enters a model, a `TextFeatures` too"
    few = ("train.precision=bf16-mixed", "train.steps=2", "train.val_every=0", "model.width=48",
           "model.heads=1")
    more = MASKED if source == "shapes-var" else PARTI
    run = train(source, tmp_path/"run", (*GENERATOR, *more, *few))
    found = logged_losses(run)
    assert len(found) == 2 and all(math.isfinite(loss) for loss in found)


def test_discriminator_under_mixed_precision(recipe, tmp_path):
    "Its weight and its penalty need gradients of their own while Fabric watches over all of them"
    more = "train.precision=bf16-mixed train.steps=4 discriminator.start=1 discriminator.r1=1"
    run = train(recipe, tmp_path/"run", (*GAN, *more.split()))
    last = read_metrics(run)[-1] | read_metrics(run)[-2]
    assert last["adversarial_weight"] > 0 and last["discriminator"] > 0


def start_one(rank, world, folder):
    meet = f"file://{folder}/meet{world}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    vectors = torch.randn(240, 4, generator=fold_in(0)).chunk(world)[rank]
    codebook = GumbelCodebook(16, 4)
    start_codes(codebook, vectors, fold_in(1))
    torch.save(codebook.state_dict(), folder/f"{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_tokenizer_loads_without_the_network_of_its_loss(recipe, tmp_path, monkeypatch):
    distance = torch.nn.PairwiseDistance()
    monkeypatch.setattr("t2i.tokenizers.training.lpips_network", lambda: distance)
    run = train(recipe, tmp_path/"run", ("train.steps=1", "perceptual=1"))
    plain = train(recipe, tmp_path/"plain", ("train.steps=1",))
    assert read_metrics(run)[0]["loss"] > read_metrics(plain)[0]["loss"]
    monkeypatch.setattr("t2i.tokenizers.training.lpips_network", None)  # it is not there
    assert t2i.load(run, "cpu").codebook_size == 32


def test_gumbel_codes_start_alike_on_two_processes(tmp_path):
    for world in (1, 2):
        start = torch.multiprocessing.start_processes
        start(start_one, (world, tmp_path), world, start_method="forkserver")
    names = ("1-0", "2-0", "2-1")
    one, *two = (torch.load(tmp_path/f"{name}.pt", weights_only=True) for name in names)
    for k, w in one.items():
        assert torch.equal(two[0][k], two[1][k]), k
        assert torch.allclose(w, two[0][k], rtol=1e-4, atol=1e-4), k
    assert len(one["weight"].unique(dim=0)) == 16


# ---- What can go wrong


def test_full_disk_keeps_the_last_whole_checkpoint(recipe, tmp_path):
    code = "import resource; from t2i.cli import main; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); main()"
    run = train(recipe, tmp_path/"run", ("train.steps=2",))
    p = processes.run("-c", code, "train", recipe, "train.steps=4", "-o", run, "--resume")
    assert p.returncode == 1
    last = p.stderr.strip().splitlines()[-1]
    assert last.startswith("t2i: could not save") and "Traceback" not in p.stderr, p.stderr
    assert last_checkpoint(run).name == "step-2"
    assert load_file(last_checkpoint(run)/"model.safetensors")
    assert [q.name for q in (run/"checkpoints").iterdir()] == ["step-2"]


def test_loss_that_is_not_finite(recipe, tmp_path):
    says = r"loss became (nan|inf) at step \d+; the last good checkpoint is step-1"
    wild = ("train.lr=1e30", "train.warmup=0", "train.save_every=1", "train.clip=0")
    with pytest.raises(T2IError, match=says):
        train(recipe, tmp_path/"run", wild)
    saved = load_file(tmp_path/"run"/"checkpoints"/"step-1"/"model.safetensors")
    assert all(torch.isfinite(v).all() for v in saved.values())


@pytest.mark.parametrize("override, names", [
    ("train.stepz=3", "stepz"), ("train.steps=many", "steps"), ("modle.depth=3", "modle"),
    ("train.steps", "key=value"), ("train.precision=8-bit", "precision"),
    ("train.optimizer=sgd", "optimizer"), ("train.batch_size=7", "batch_size"),
    ("data.name=mnist", "mnist"), ("train.init_from=/nowhere", "/nowhere"),
])
def test_bad_recipes_name_the_key(recipe, tmp_path, override, names):
    extra = ("train.accumulate=2",) if "batch" in override else ()
    with pytest.raises(ValueError, match=names):
        train(recipe, tmp_path/"run", (override, *extra))
    assert not (tmp_path/"run").exists()


def test_bad_recipe_files(tmp_path):
    with pytest.raises(T2IError, match="no recipe"):
        load_recipe("no-such-recipe")
    texts = {"[1, 2": "no YAML", "train: {}": "task", "task: t2i.nothing.Task": "no task"}
    for text, says in texts.items():
        (tmp_path/"bad.yaml").write_text(text)
        with pytest.raises(T2IError, match=says):
            load_recipe(tmp_path/"bad.yaml")


@pytest.mark.parametrize("name, rows", [("shapes-msvq", 2), ("shapes-sr4", 3), ("shapes-clip", 1)])
def test_samples_show_each_held_out_image_once(tmp_path, name, rows):
    for i in range(21):
        Image.new("RGB", (40, 40), (10*i, 0, 0)).save(tmp_path/f"{i:02}.png")
        (tmp_path/f"{i:02}.txt").write_text("a square")
    line = json.dumps(dict(file_name="19.png", text=["a square", "a box", "a tile"])) + "\n"
    for i in range(19):
        line += json.dumps(dict(file_name=f"{i:02}.png", text="a square")) + "\n"
    (tmp_path/"captions.jsonl").write_text(line)
    side = 256 if name == "shapes-sr4" else 64
    recipe = load_recipe(name, (f"data.path={tmp_path}", f"data.resolution={side}"))
    task = recipe.task(recipe.config)
    with torch.no_grad():
        assert len(task.sample()) == rows
    assert task.columns == (None if name == "shapes-clip" else 1)


def test_a_run_is_not_overwritten(recipe, tmp_path):
    run = train(recipe, tmp_path/"run", ("train.steps=1",))
    with pytest.raises(T2IError, match="--resume"):
        train(recipe, run, ("train.steps=1",))
    with pytest.raises(T2IError, match="no checkpoint"):
        train(recipe, tmp_path/"other", resume=True)


def test_truncated_checkpoint(recipe, tmp_path):
    run = train(recipe, tmp_path/"run", ("train.steps=1",))
    path = last_checkpoint(run)/"model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(T2IError, match="cannot read .*model.safetensors"):
        train(recipe, run, ("train.steps=2",), resume=True)
