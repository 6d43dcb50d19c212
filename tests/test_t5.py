"A frozen T5 in the place of a CLIP: trained with, saved, loaded, resumed, drawn with"
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import t2i
from t2i.core import T2IError
from t2i.data.shapes import render, sample_scene
from t2i.engine.recipes import load_recipe
from t2i.engine.runs import read_metrics
from t2i.guidance.clip_cache import FrozenCLIPEncoder
from t2i.guidance.t5 import FrozenT5
from t2i.training import train

pytest.importorskip("transformers")
SMALL = ("model.depth=1", "model.width=32", "model.heads=2", "text.width=32",
         "text.heads=2", "reading_pairs=0",
         "train.batch_size=4", "train.workers=0", "train.compile=false", "train.val_batches=1",
         "train.sample_every=0")


def write_t5(folder, seed=0):
    "A T5 of random weights, in the files of a published one"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator([sample_scene(i).caption for i in range(300)], trainer)
    pieces.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=pieces, **names).save_pretrained(folder)
    sizes = dict(d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        T5EncoderModel(T5Config(vocab_size=80, **sizes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A T5, and a folder of captioned images"
    desk = tmp_path_factory.mktemp("t5")
    write_t5(desk/"t5")
    (desk/"images").mkdir()
    for i in range(40):
        scene = sample_scene(i)
        Image.fromarray(render(scene)).save(desk/"images"/f"{i}.png")
        (desk/"images"/f"{i}.txt").write_text(scene.caption)
    return desk


def settings(desk, steps, *more):
    clip, images = f"clip=t5:{desk/'t5'}", f"data.path={desk/'images'}"
    own = f"data.cache_dir={desk/'cache'}", f"train.steps={steps}", f"train.save_every={steps//2}"
    return clip, images, *own, *SMALL, *more


TEXT_VAR = "text-var", "tokenizer=shapes-msvq"
WAYS = {"parti": ("shapes-parti",), "text-var": TEXT_VAR,
        "clip-var": ("shapes-clip-var-full", "start=null")}


@pytest.mark.parametrize("weight, away", [(.3, False), (0, True)])
def test_a_t5_that_reads_near_misses_stays_on_the_device(desk, tmp_path, monkeypatch, weight, away):
    places, move = [], FrozenT5.to
    monkeypatch.setattr(FrozenT5, "to", lambda t5, place: places.append(place) or move(t5, place))
    fields = f"contrast.weight={weight}", "train.val_every=0"
    train("shapes-parti", tmp_path/"run", settings(desk, 2, *fields))
    assert ("cpu" in places) == away


@pytest.mark.parametrize("way", WAYS)
def test_trains_saves_loads_and_draws(way, desk):
    recipe, *more = WAYS[way]
    run = desk/way
    train(recipe, run, settings(desk, 4, *more))
    parts = json.loads((run/"parts.json").read_text())
    assert parts["clip"]["name"] == f"t5:{desk/'t5'}" and len(parts["clip"]["fingerprint"]) == 16
    pipe = t2i.load(run)
    assert isinstance(pipe.text_encoder, FrozenCLIPEncoder)
    image = pipe("a red circle", seed=0).images[0]
    assert image.size == (64, 64)
    pipe.save_pretrained(desk/f"{way}-kept")
    kept = t2i.load(desk/f"{way}-kept")
    assert kept("a red circle", seed=0).images[0].tobytes() == image.tobytes()
    both = kept(["a red circle", "a large blue star left of a small green heart"], seed=0).images
    apart = np.asarray(both[0], np.int16) - np.asarray(image)
    assert abs(apart).max() <= 2  # the other prompt changes nothing but roundings


def test_resumes_to_the_same_weights_and_reads_captions_ahead(desk):
    whole, halves = desk/"whole", desk/"halves"
    train("shapes-parti", whole, settings(desk, 4))
    assert list((desk/"cache"/"text").glob("*.safetensors"))  # the captions were read ahead
    shutil.copytree(whole, halves)
    (halves/"last").write_text("step-2")
    train("shapes-parti", halves, resume=True)
    a, b = (t2i.load(run).generator.state_dict() for run in (whole, halves))
    assert all(torch.equal(a[k], b[k]) for k in a)
    live = desk/"live"
    train("shapes-parti", live, settings(desk, 4, "read_ahead=false"))
    losses = [read_metrics(run)[-1]["val_loss"] for run in (whole, live)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # kept in 16 bits


def test_a_run_is_moved_with_its_t5_and_only_with_it(desk, monkeypatch):
    write_t5(desk/"before"/"own")
    monkeypatch.chdir(desk/"before")
    train("shapes-parti", "run", settings(desk, 2, "clip=t5:own"))
    image = t2i.load("run")("a red circle", seed=0).images[0]
    monkeypatch.chdir(desk)
    (desk/"before").rename(desk/"after")
    assert t2i.load("after/run")("a red circle", seed=0).images[0].tobytes() == image.tobytes()
    shutil.rmtree(desk/"after"/"own")
    with pytest.raises(T2IError, match="the clip of after/run is gone from after/own"):
        t2i.load("after/run")


def test_a_parti_counts_no_text_encoder_of_its_own(desk):
    recipe = load_recipe("shapes-parti", settings(desk, 2))
    task = recipe.task(recipe.config)
    assert task.parameters == sum(p.numel() for p in task.model.generator.parameters())


def test_another_t5_is_refused(desk):
    run = desk/"refusing"
    train("shapes-parti", run, settings(desk, 2))
    kept = desk/"refusing-kept"
    t2i.load(run).save_pretrained(kept)
    write_t5(desk/"t5", seed=1)
    try:
        with pytest.raises(T2IError, match="another CLIP than t5:"):
            t2i.load(kept)
        with pytest.raises(T2IError, match="was trained with clip t5:"):
            train("shapes-parti", run, settings(desk, 4), resume=True)
    finally:
        write_t5(desk/"t5")


def test_a_long_prompt_is_warned_of_and_a_missing_t5_named(desk, caplog):
    run = desk/"warning"
    train("shapes-parti", run, settings(desk, 2))
    pipe = t2i.load(run)
    with caplog.at_level(logging.WARNING, "t2i"):
        pipe(" ".join(["a red circle"]*60), seed=0)
    assert "128 tokens: the rest is cut" in caplog.text
    with pytest.raises(T2IError, match="cannot load t5:no/such"):
        train("shapes-parti", desk/"none", ("clip=t5:no/such",))
