"Runs on the smallest task: loss scale, resume with changes, locks, trackers, recipes."
import errno
import fcntl
import gc
import logging
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import processes
import t2i
import t2i.training as training
import tiny
from t2i.core import T2IError
from t2i.engine.checkpoints import last_checkpoint
from t2i.engine.distributed import make_fabric
from t2i.engine.recipes import load_recipe, save_recipe
from t2i.engine.resume import parameter_names, save_run
from t2i.engine.runs import RunLog, init_run_dir, read_metrics, save_checkpoint
from t2i.subjects import load_subject
from t2i.training import TrainConfig, TrainingState, batches, train, train_step
from tiny import CaptionedTask, ContrastiveTask, TinyConfig, TinyTask, recipe

here = Path(__file__).resolve().parent
ADVERSARIAL = TinyConfig(adversarial=True)
SILENT = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)


def environment():
    "For processes: the task of tests/tiny.py can be imported, and there is no GPU"
    path = os.pathsep.join([str(here), *sys.path])
    return os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def weights(run, name="model"):
    "The weights of a run's last checkpoint"
    return load_file(last_checkpoint(run)/f"{name}.safetensors")


def same(a, b):
    "Are two sets of weights equal, to the last bit?"
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps(state, count):
    "Takes some steps"
    data = batches(state, "train", range(state.step, state.step+count))
    return [train_step(state, data) for _ in range(count)]


# ---- float16: one loss scale for all optimizers


@pytest.fixture
def float16(monkeypatch):
    "Fabric with float16's loss scale, which it has on a GPU, on the CPU"
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    def fabric(config):
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu")])

    monkeypatch.setattr(training, "make_fabric", fabric)


@pytest.fixture
def seen(monkeypatch):
    "The norm of the gradient with which each optimizer steps, by its kind and parameters"
    found = {}
    for kind in (torch.optim.AdamW, torch.optim.Muon):
        def spy(self, closure=None, step=kind.step, kind=kind):
            grads = [p.grad for g in self.param_groups for p in g["params"]]
            grads = [g.flatten() for g in grads if g is not None]
            norm = torch.cat(grads).norm().item() if grads else 0.
            found.setdefault((kind.__name__, len(self.param_groups)), []).append(norm)
            return step(self, closure)
        monkeypatch.setattr(kind, "step", spy)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("clip", [0., 1.])
def test_float16_trains(float16, tmp_path, optimizer, clip):
    run = train(recipe(config=ADVERSARIAL, optimizer=optimizer, clip=clip, steps=30), tmp_path/"r")
    losses = [line["loss"] for line in read_metrics(run) if "loss" in line]
    assert losses[-1] < losses[0]


def test_float16_unscales_every_optimizer_once(tmp_path, seen, request):
    norms = []
    for name in ("plain", "scaled"):
        if name == "scaled":
            request.getfixturevalue("float16")
        state = TrainingState(recipe(config=ADVERSARIAL, optimizer="muon"), tmp_path/name)
        seen.clear()
        updates = []
        if state.scaler:
            update = state.scaler.update
            state.scaler.update = lambda: updates.append(update())
        steps(state, 3)
        norms.append(dict(seen))
        assert len(updates) == (3 if name == "scaled" else 0)
    plain, scaled = norms
    assert len(plain) == 3 and plain.keys() == scaled.keys()  # model twice, discriminator
    for optimizer in plain:
        assert scaled[optimizer] == pytest.approx(plain[optimizer], rel=.05, abs=1e-4), optimizer


class Overflowing(TinyTask):
    "The discriminator's gradient overflows in its first step"
    def discriminator_step(self, batch):
        loss, logs = super().discriminator_step(batch)
        if self.step == 1:
            loss = loss*1e38
        return loss, logs


def test_float16_all_optimizers_skip_or_none(float16, tmp_path):
    state = TrainingState(recipe(Overflowing, ADVERSARIAL, optimizer="muon"), tmp_path/"run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(state, 1)
        before = {n: p.detach().clone() for p, n in parameter_names(state).items()}
        scale = state.scaler.get_scale()
        steps(state, 1)
        assert all(torch.equal(p, before[n]) for p, n in parameter_names(state).items())
        assert state.scaler.get_scale() == scale/2
        steps(state, 1)
    assert not any(torch.equal(p, before[n]) for p, n in parameter_names(state).items())


def test_float16_gives_up_where_the_scale_is_not_to_blame(float16, tmp_path):
    class Steep(TinyTask):
        def training_step(self, batch):
            loss, logs = super().training_step(batch)
            return loss + (next(self.model.parameters())*0).abs().sqrt().sum(), logs

    with pytest.raises(T2IError, match="the gradient became nan at step"):
        train(recipe(Steep, steps=100), tmp_path/"run")


# ---- Precision


@pytest.mark.parametrize("name", ["64-true", "bf16-true", "16-true", "transformer-engine", "x"])
def test_other_precisions_are_refused_by_name(name):
    with pytest.raises(T2IError, match=f"train.precision is '{name}'.*32-true, bf16-mixed"):
        TrainConfig(precision=name)


@pytest.mark.parametrize("name", ["auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16"])
def test_precisions_that_train(tmp_path, name):
    train(recipe(precision=name, steps=2), tmp_path/"run")


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "dp"])
def test_other_strategies_are_refused_by_name(name):
    with pytest.raises(T2IError, match=f"train.strategy is '{name}'"):
        TrainConfig(strategy=name)


# ---- Resume with changes


class LastLayerTask(TinyTask):
    "Trains the last layer alone"
    def __init__(self, config, folder=None):
        super().__init__(config, folder)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name.startswith("last"))


def momenta(state):
    "What the optimizers remember, by parameter"
    names = parameter_names(state)
    return {names[p]: s for o in state.optimizers for p, s in o.state.items() if s}


def test_resume_with_fewer_trained_parts(tmp_path, caplog):
    first = TrainingState(recipe(), tmp_path/"run")
    steps(first, 3)
    save_run(first)
    saved = momenta(first)
    second = TrainingState(recipe(LastLayerTask), tmp_path/"run", resume=True)
    assert sorted(momenta(second)) == ["model.last.bias", "model.last.weight"]
    for name, state in momenta(second).items():
        assert all(torch.equal(state[k], saved[name][k]) for k in state)
    assert "anew" not in caplog.text
    steps(second, 2)


def test_resume_with_more_trained_parts(tmp_path, caplog):
    first = TrainingState(recipe(LastLayerTask), tmp_path/"run")
    steps(first, 3)
    save_run(first)
    second = TrainingState(recipe(), tmp_path/"run", resume=True)
    assert sorted(momenta(second)) == ["model.last.bias", "model.last.weight"]
    assert "the optimizer starts anew for 4 of 6 parameters" in caplog.text
    steps(second, 2)


@pytest.mark.parametrize("before, after", [("adamw", "muon"), ("muon", "adamw")])
def test_resume_with_another_optimizer(tmp_path, caplog, before, after):
    train(recipe(optimizer=before, steps=2), tmp_path/"run")
    state = TrainingState(recipe(optimizer=after), tmp_path/"run", resume=True)
    assert "model.blocks.0.weight" not in momenta(state)
    assert len(momenta(state)) == 5
    assert "the optimizer starts anew for 1 of 6 parameters" in caplog.text
    steps(state, 2)


def test_resume_refuses_memory_of_another_shape(tmp_path):
    state = TrainingState(recipe(), tmp_path/"run")
    steps(state, 1)
    save_run(state)
    path = last_checkpoint(tmp_path/"run")/"state.pt"
    saved = torch.load(path, weights_only=True)
    saved["optimizers"]["AdamW"]["model.last.weight"]["exp_avg"] = torch.zeros(3)
    torch.save(saved, path)
    state = TrainingState(recipe(), tmp_path/"run", resume=True)
    assert "model.last.weight" not in momenta(state) and len(momenta(state)) == 5


def test_resume_with_a_new_discriminator(tmp_path, caplog):
    train(recipe(steps=2), tmp_path/"run")
    train(recipe(config=ADVERSARIAL), tmp_path/"run", resume=True)
    assert "step-2 has none" in caplog.text
    assert any("discriminator" in line for line in read_metrics(tmp_path/"run"))


def test_resume_with_another_discriminator(tmp_path, caplog):
    class Wider(TinyTask):
        def __init__(self, config, folder=None):
            super().__init__(config, folder)
            self.discriminator = torch.nn.Linear(2, 3)

    train(recipe(config=ADVERSARIAL, steps=2), tmp_path/"run")
    train(recipe(Wider), tmp_path/"run", resume=True)
    assert "step-2 has another one" in caplog.text


def test_resume_without_the_discriminator(tmp_path, caplog):
    train(recipe(config=ADVERSARIAL, steps=2), tmp_path/"run")
    train(recipe(), tmp_path/"run", resume=True)
    assert "anew" not in caplog.text


def test_nothing_to_do_leaves_the_recipe(tmp_path):
    run = train(recipe(steps=3), tmp_path/"run")
    before = (run/"recipe.yaml").read_text()
    train(recipe(steps=2), run, resume=True)
    assert (run/"recipe.yaml").read_text() == before


def test_resume_in_another_precision(float16, tmp_path, monkeypatch):
    train(recipe(steps=2), tmp_path/"run")
    monkeypatch.setattr(training, "make_fabric", make_fabric)
    train(recipe(steps=4), tmp_path/"run", resume=True)
    assert last_checkpoint(tmp_path/"run").name == "step-4"


def test_rates_follow_the_recipe_of_today(tmp_path):
    train(recipe(steps=2, warmup=0, final_lr=1.), tmp_path/"run")
    train(recipe(steps=3, warmup=0, final_lr=1., lr=5e-3), tmp_path/"run", resume=True)
    rates = [line["lr"] for line in read_metrics(tmp_path/"run") if "lr" in line]
    assert rates == pytest.approx([1e-2, 1e-2, 5e-3])


def test_state_of_another_version_is_one_line(tmp_path):
    train(recipe(steps=2), tmp_path/"run")
    torch.save(dict(step=2, optimizers=[]), last_checkpoint(tmp_path/"run")/"state.pt")
    with pytest.raises(T2IError, match="state.pt was written by another version.*train.init_from"):
        train(recipe(), tmp_path/"run", resume=True)


DROPOUT = TinyConfig(dropout=.5)


def test_looking_changes_nothing(tmp_path):
    train(recipe(config=DROPOUT), tmp_path/"blind")
    train(recipe(config=DROPOUT, val_every=2, sample_every=1), tmp_path/"seeing")
    assert same(weights(tmp_path/"blind"), weights(tmp_path/"seeing"))


def test_the_callers_random_numbers_go_on(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    train(recipe(config=DROPOUT), tmp_path/"run")
    assert torch.equal(torch.rand(3), expected)


class CollectingTask(TinyTask):
    "Python collects its garbage in the third step, as it does at any time"
    def after_step(self, generator):
        if self.step == 2:
            gc.collect()


def test_a_run_of_ones_own_task_loads_as_its_model(tmp_path):
    run = train(recipe(steps=2), tmp_path/"run")
    net = t2i.load(run, "cpu")
    assert type(net) is tiny.Net and not net.training
    assert same(net.state_dict(), weights(run, "ema"))
    with pytest.raises(T2IError, match="no benchmark of t2i fits it"):
        load_subject(str(run), "cpu")


def test_a_forgotten_state_moves_no_random_numbers(tmp_path):
    train(recipe(config=DROPOUT), tmp_path/"whole")
    gc.disable()  # not before the third step
    try:
        TrainingState(recipe(config=DROPOUT), tmp_path/"forgotten")  # nobody closes it
        train(recipe(CollectingTask, DROPOUT), tmp_path/"run")
    finally:
        gc.enable()
    assert same(weights(tmp_path/"whole"), weights(tmp_path/"run"))


def torchrun(folder, run, *overrides):
    "Trains in two processes by folder/dropout.yaml"
    (folder/"dropout.yaml").write_text("task: tiny.TinyTask\ndropout: 0.5\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "t2i.cli", "train", folder/"dropout.yaml", "-o", folder/run, *overrides]
    subprocess.run(command, check=True, env=environment(), stdin=subprocess.DEVNULL)


def test_each_process_resumes_its_own_random_numbers(tmp_path):
    torchrun(tmp_path, "whole", "train.steps=6")
    command = "-m", "t2i.cli", "train", tmp_path/"dropout.yaml", "-o", tmp_path/"parts"
    steps = "train.steps=6", "train.warmup=2", "train.save_every=3"
    processes.torchrun(2, *command, *steps)
    state = torch.load(tmp_path/"parts"/"checkpoints"/"step-3"/"state.pt", weights_only=True)
    one, two = [random["cpu"] for random in state["random"]]
    assert not torch.equal(one, two)
    (tmp_path/"parts"/"last").write_text("step-3")
    processes.torchrun(2, *command, "--resume")
    assert same(weights(tmp_path/"whole"), weights(tmp_path/"parts"))


# ---- An error while looking loses nothing


def numbers(run):
    "The losses of a run, step by step"
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in read_metrics(run)]


@pytest.mark.parametrize("name", ["validate", "draw_samples"])
@pytest.mark.parametrize("save_every", [4, 500])
def test_an_error_while_looking_loses_nothing(tmp_path, monkeypatch, name, save_every):
    looked = recipe(config=DROPOUT, val_every=4, sample_every=4, save_every=save_every)
    train(looked, tmp_path/"whole")

    def boom(state):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(training, name, boom)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(looked, tmp_path/"run")
    assert last_checkpoint(tmp_path/"run").name == "step-4"
    train(looked, tmp_path/"run", resume=True)
    assert same(weights(tmp_path/"whole"), weights(tmp_path/"run"))
    assert numbers(tmp_path/"whole") == numbers(tmp_path/"run")  # also the validation that failed


# ---- What cannot be meant is refused, and leaves nothing


class BadData(TinyTask):
    def dataset(self, split):
        raise T2IError("no folder nowhere")


class NoHeldOut(TinyTask):
    def dataset(self, split):
        if split == "val":
            raise T2IError("nothing held out")
        return super().dataset(split)


class BadFirstStep(TinyTask):
    def __init__(self, config, folder=None):
        super().__init__(config, folder)
        (folder/"text_tokenizer").mkdir(exist_ok=True)
        (folder/"text_tokenizer"/"tokenizer.json").write_text("{}")

    def training_step(self, batch):
        raise ValueError("captions of another kind")


@pytest.mark.parametrize("bad", [
    recipe(BadData), recipe(NoHeldOut), recipe(BadFirstStep), recipe(accumulate=3),
    recipe(ContrastiveTask, accumulate=2), recipe(init_from="nowhere"),
], ids=["data", "held-out", "first-step", "parts", "contrastive", "weights"])
def test_a_refused_start_leaves_nothing(tmp_path, bad):
    with pytest.raises(Exception):
        train(bad, tmp_path/"runs"/"new")
    assert not list(tmp_path.iterdir())
    (tmp_path/"old").mkdir()
    (tmp_path/"old"/"notes.txt").write_text("mine")
    with pytest.raises(Exception):
        train(bad, tmp_path/"old")
    assert [p.name for p in (tmp_path/"old").iterdir()] == ["notes.txt"]


def test_a_refused_resume_changes_nothing(tmp_path):
    run = train(recipe(steps=2), tmp_path/"run")
    before = sorted(run.rglob("*"))
    with pytest.raises(T2IError):
        train(recipe(BadData), run, resume=True)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("train_config", [dict(accumulate=2), dict(batch_size=1)])
def test_contrastive_losses_are_not_split(tmp_path, train_config):
    with pytest.raises(T2IError, match="ContrastiveTask compares the images of a batch"):
        train(recipe(ContrastiveTask, **train_config), tmp_path/"run")


# ---- Stopped by signals


def interrupted(tmp_path, number):
    "A training to which a signal comes in its third step"
    class Stopped(TinyTask):
        def after_step(self, generator):
            if self.step == 2:
                os.kill(os.getpid(), number)

    train(recipe(Stopped, config=DROPOUT, save_every=0), tmp_path/"run")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_first(tmp_path, caplog, name):
    def not_caught(number, frame):
        raise RuntimeError("the signal was not caught")

    number = getattr(signal, name)
    usual = signal.signal(number, not_caught)
    try:
        interrupted(tmp_path, number)
        assert signal.getsignal(number) == not_caught
    finally:
        signal.signal(number, usual)
    assert "stopped at step 3 of 6; go on with --resume" in caplog.text
    assert last_checkpoint(tmp_path/"run").name == "step-3"
    train(recipe(config=DROPOUT), tmp_path/"run", resume=True)
    train(recipe(config=DROPOUT), tmp_path/"whole")
    assert same(weights(tmp_path/"run"), weights(tmp_path/"whole"))


def test_nohup_stays_deaf(tmp_path):
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupted(tmp_path, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert last_checkpoint(tmp_path/"run").name == "step-6"


# ---- Locks, trackers, files of others


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_drive_without_locks(tmp_path, monkeypatch, name):
    def flock(fd, operation):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(recipe(), tmp_path/"run")
    assert last_checkpoint(tmp_path/"run").name == "step-6"


def test_a_folder_is_held_by_one_training(tmp_path):
    code = "import sys, pathlib; from t2i.engine.runs import RunLock; "
    code += "lock = RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, tmp_path/"run"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment(), **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(T2IError, match="another training is at work"):
            init_run_dir(tmp_path/"run", False, wait=.1)
        assert (tmp_path/"run"/".lock").exists()
        other.stdin.close()
    init_run_dir(tmp_path/"run", False).release()


@pytest.mark.parametrize("error", ["TypeError('Descriptors')", "AttributeError()", "SystemExit(1)"])
def test_a_tensorboard_that_cannot_be_imported(tmp_path, error):
    (tmp_path/"fake"/"tensorboard").mkdir(parents=True)
    (tmp_path/"fake"/"tensorboard"/"__init__.py").write_text(f"raise {error}")
    code = f"import sys; sys.path.insert(0, {str(tmp_path/'fake')!r}); "
    code += "from t2i.cli import main; main()"
    (tmp_path/"tiny.yaml").write_text("task: tiny.TinyTask\n")
    p = processes.run("-c", code, "train", tmp_path/"tiny.yaml", "-o", tmp_path/"run")
    assert p.returncode == 0, p.stderr
    assert p.stderr.count("TensorBoard fails and is left out") == 1


def test_a_file_in_the_place_of_tensorboards_folder(tmp_path, caplog):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"tensorboard").write_text("mine")
    train(recipe(), tmp_path/"run")
    assert caplog.text.count("TensorBoard fails and is left out") == 1
    assert (tmp_path/"run"/"tensorboard").read_text() == "mine"


def test_a_tensorboard_that_fails_later(tmp_path, caplog, monkeypatch):
    from lightning.fabric.loggers import TensorBoardLogger

    def full(self, metrics, step):
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", full)
    run = train(recipe(), tmp_path/"run")
    assert "No space left on device" in caplog.text
    assert len(read_metrics(run)) == 7


def test_weights_and_biases_gets_numbers_and_samples_with_prompts(tmp_path, monkeypatch):
    logged, given = [], {}
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=dict)
    fake = SimpleNamespace(init=lambda **options: given.update(options) or run,
                           Image=lambda path, caption: (path, caption))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path/"recipe.yaml").write_text("note: mine")
    log = RunLog(tmp_path, 0, 2, 8)
    log.train(1, dict(loss=.5), True)
    Image.new("RGB", (8, 8)).save(tmp_path/"grid.png")
    log.metrics.track("images", 1, tmp_path/"grid.png", ["a red circle", "a star"])
    log.close()
    assert given["dir"] == tmp_path and given["config"] == dict(note="mine")
    assert [step for step, _ in logged] == [1, 1] and logged[0][1]["loss"] == .5
    assert logged[1][1]["samples"] == (str(tmp_path/"grid.png"), "a red circle\na star")


def test_tensorboard_shows_samples_and_their_prompts(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (8, 8)).save(tmp_path/"grid.png")
    log = RunLog(tmp_path, 0, 2, 8)
    log.metrics.track("images", 1, tmp_path/"grid.png", ["a red circle", "a star"])
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path/"tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [1]
    (text,) = events.Tensors("prompts/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "1. a red circle\n2. a star"


def test_tensorboard_keeps_the_step_of_the_checkpoint(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(recipe(steps=3), tmp_path/"run")
    train(recipe(steps=5), tmp_path/"run", resume=True)
    events = accumulator.EventAccumulator(str(tmp_path/"run"/"tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("val_loss")] == [3, 5]
    lines = read_metrics(tmp_path/"run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_files_of_others_do_not_matter(tmp_path):
    run = train(recipe(steps=2, keep=1), tmp_path/"run")
    (run/"checkpoints"/"step-2-backup").mkdir()
    (run/"checkpoints"/"notes.txt").write_text("mine")
    (run/".mine.tmp").write_text("mine")
    (run/".recipe.yaml.123.tmp").write_text("torn")
    train(recipe(keep=1), run, resume=True)
    left = sorted(p.name for p in (run/"checkpoints").iterdir())
    assert left == ["notes.txt", "step-2-backup", "step-6"]
    assert (run/".mine.tmp").exists() and not (run/".recipe.yaml.123.tmp").exists()


def test_a_checkpoint_beyond_the_last_does_not_count(tmp_path):
    "A kill between writing a checkpoint and pointing at it leaves one that is newer than `last`"
    net = tiny.Net(2, 0.)
    for step in (10, 20):
        save_checkpoint(tmp_path, step, net, net, {}, keep=2)
    (tmp_path/"last").write_text("step-10")
    save_checkpoint(tmp_path, 15, net, net, {}, keep=1)
    assert last_checkpoint(tmp_path).name == "step-15" and last_checkpoint(tmp_path).is_dir()


# ---- What is said and written


def test_what_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "t2i")
    train(recipe(val_every=3, val_batches=2), tmp_path/"run")
    lines = caplog.messages
    assert "images to train on: 40; held out: 40" in lines
    validations = [line for line in lines if "val_loss" in line]
    assert [line[:8] for line in validations] == ["step 3: ", "step 6: "]
    value = [line for line in read_metrics(tmp_path/"run") if "val_loss" in line][-1]["val_loss"]
    assert f"val_loss {value:.4g}" in validations[-1]


def test_samples_carry_their_captions(tmp_path):
    train(recipe(CaptionedTask), tmp_path/"run")
    image = Image.open(tmp_path/"run"/"samples"/"step-6.png")
    assert image.text["captions"].split("\n") == ["one", "zwei, drei…"]
    assert image.text["step"] == "6"


def test_names_of_the_average_are_the_models(tmp_path):
    run = train(recipe(), tmp_path/"run")
    assert weights(run, "ema").keys() == weights(run).keys() == tiny.Net(8, 0.).state_dict().keys()


def test_lightnings_launcher_prints_once(tmp_path):
    (tmp_path/"tiny.yaml").write_text("task: tiny.TinyTask\ntrain: {devices: 2}\n")
    command = [sys.executable, "-m", "t2i.cli", "train", tmp_path/"tiny.yaml", "-o", tmp_path/"run"]
    env = environment()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        env.pop(name, None)
    p = subprocess.run(command, env=env, **SILENT)
    assert p.returncode == 0, p.stderr
    assert p.stdout.splitlines() == [str(tmp_path/"run")]


# ---- Recipes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A working folder with a task, where Python does not look for modules"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path/"mytask.py").write_text("from tiny import TinyTask\nclass MyTask(TinyTask): pass\n")
    monkeypatch.delitem(sys.modules, "mytask", raising=False)
    yield tmp_path
    sys.modules.pop("mytask", None)


def load(text, *overrides):
    "The recipe that a text makes"
    Path("my.yaml").write_text(text)
    return load_recipe("my.yaml", overrides)


def test_a_task_in_the_working_folder(folder):
    path = list(sys.path)
    assert load("task: mytask.MyTask").task.__name__ == "MyTask"
    assert sys.path == [*path, str(folder)]  # last


@pytest.mark.parametrize("code, says", [
    ("import nonexistent_module", "ModuleNotFoundError: No module named 'nonexistent_module'"),
    ("from t2i.core import nothing", "ImportError: cannot import name 'nothing'"),
    ("1/0", "ZeroDivisionError: division by zero"),
    ("def f(:", "SyntaxError"),
])
def test_an_error_in_the_tasks_module_shows_its_cause(folder, code, says):
    Path("broken.py").write_text(code)
    with pytest.raises(T2IError, match=f"my.yaml: no task 'broken.MyTask'.*{says}"):
        load("task: broken.MyTask")


@pytest.mark.parametrize("name, says", [
    ("nowhere.MyTask", "no module 'nowhere'"), ("t2i.nothing.Task", "no module 't2i.nothing'"),
    ("mytask.Other", "has no Other"), ("mytask", "MODULE.CLASS"), ("os.path", "no dataclass"),
])
def test_a_task_that_is_not_there(folder, name, says):
    with pytest.raises(T2IError, match=f"no task '{name}'.*{says}"):
        load(f"task: {name}")


@pytest.mark.parametrize("text, line", [
    ("task: mytask.MyTask\nhidden: [1, 2\ntrain: {}", 3),
    ("task: mytask.MyTask\n\nhidden: 'x\n", 4),
    ("task: mytask.MyTask\nhidden: 3\nhidden: 4", 3),
    ("task: mytask.MyTask\n\thidden: 3", 2),
])
def test_a_mistake_in_yaml_names_the_line(folder, text, line):
    with pytest.raises(T2IError, match=rf"my.yaml is no YAML \(line {line}\): \w"):
        load(text)


WRITTEN = ["007", "1e5", "yes", "2024-01-01", "0x10", "1_000", "[a", "a: b", "x #1", "'", "5.0"]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_stays_as_it_was_written(folder, text):
    assert load("task: mytask.MyTask", f"note={text}").config.note == text


@pytest.mark.parametrize("text", ["007", "1e5", "yes", "2024-01-01", "0x10", "1_000", "5.0"])
def test_text_in_yaml_stays_as_it_was_written(folder, text):
    made = load(f"task: mytask.MyTask\nnote: {text}")
    assert made.config.note == text
    save_recipe(made, folder)
    assert load_recipe("recipe.yaml").config.note == text


def test_text_can_be_nothing_or_quoted(folder):
    assert load("task: mytask.MyTask\nnote: x", "note=null").config.note is None
    assert load("task: mytask.MyTask", "note='null'").config.note == "null"


@pytest.mark.parametrize("override, names", [
    ("train.seed=[1,2]", "train.seed"), ("train.steps=1.5", "train.steps"),
    ("train.steps=true", "train.steps"), ("train.betas=[a,b]", "train.betas"),
    ("train.betas=0.9", "train.betas"), ("train=3", "train"), ("train.seed={a: 1}", "train.seed"),
    ("train.lr=nan", "train.lr"), ("train.lr=.inf", "train.lr"), ("train.steps='", "train.steps"),
    ("train.seed=null", "train.seed"), ("train.keep=0", "train.keep"), ("hidden=", "hidden"),
])
def test_a_value_of_another_type_is_one_line(folder, override, names):
    with pytest.raises(T2IError, match=names) as caught:
        load("task: mytask.MyTask", override)
    assert "\n" not in str(caught.value)


def test_fields_keep_their_types(folder):
    config = load("task: mytask.MyTask\ntrain: {lr: 1, betas: [0, 0.5]}", "train.ema=0").config
    assert (config.train.lr, config.train.betas, config.train.ema) == (1., (0., .5), 0.)
    assert {type(v) for v in (config.train.lr, *config.train.betas, config.train.ema)} == {float}
    assert isinstance(config.train.betas, tuple)
    assert replace(config) == config
