"Next-scale generators: cached and plain sampling of the bundled models, a run and its tokenizer."
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

import t2i
from t2i.core import T2IError
from t2i.engine.checkpoints import load_model, read_weights
from t2i.engine.files import bundled_folder
from t2i.generators.masked_var import (
    MaskedPredictor,
    MaskedTextVAR,
    MaskedTextVARConfig,
    draw_gumbel,
    stream_masked,
)
from t2i.generators.text_training import TextVARTask
from t2i.generators.text_var import PooledTextVAR, PooledTextVARConfig, TextVAR, TextVARConfig
from t2i.generators.var import VARConfig, generate_naive
from t2i.guidance.clip_cache import FrozenCLIPConfig, FrozenCLIPEncoder
from t2i.sampling import (
    cfg_schedule,
    classifier_free_guidance,
    draw_uniform,
    sample_codes,
    split_generator,
    unmasking_schedule,
)
from t2i.text import TextFeatures
from t2i.training import train

PROMPTS = ["a large red circle on a gray background", "two small green hearts"]
DIGITS = ["a handwritten seven", "a handwritten two"]
SHORT = ("train.steps=1", "train.batch_size=4", "train.val_batches=1", "train.sample_every=0",
         "train.compile=false")  # fmt: skip


def in_double(name):
    "A bundled model in 64 bits, in which no rounding decides between two tokens"
    pipe = t2i.load(name, "cpu")
    pipe.generator.double()
    pipe.tokenizer.double()
    return pipe


@pytest.fixture(scope="module")
def shapes():
    return in_double("shapes-var")


@pytest.fixture(scope="module")
def digits():
    return in_double("digits-var")


# ---- The cache changes the speed alone


def encode(pipe, prompts):
    features = pipe.encode(prompts)
    return replace(features, tokens=features.tokens.double(), pooled=features.pooled.double())


def conditions(pipe, prompts):
    "With the captions, and without"
    texts = prompts, [""]*len(prompts)
    return [pipe.generator.condition(encode(pipe, t)) for t in texts]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def masked_naive(net, quantizer, cond, null, generators, weights, num_steps, temperature):
    "All maps so far in each step; a map's known tokens stay those of its last step"
    ids, known = [], []
    for i, size in enumerate(net.sizes):
        uniform = draw_uniform(generators, size)
        noise = torch.zeros_like(uniform)
        if num_steps > 1:
            noise = draw_gumbel(generators, size)
        ids.append(torch.zeros_like(uniform).long())
        known.append(torch.zeros_like(uniform).bool())
        unmasked, counts = known[i], unmasking_schedule(size, num_steps)
        for step, count in enumerate(counts, 1):
            known[i] = unmasked
            a, b = [net(c, quantizer, ids, known)[:, -size:] for c in (cond, null)]
            logits = classifier_free_guidance(a, b, weights[i])
            ids[i] = torch.where(unmasked, ids[i], sample_codes(logits, uniform, temperature))
            chances = logits.log_softmax(-1).gather(-1, ids[i][..., None])[..., 0]
            chances = chances + noise*temperature*(1 - step/len(counts)) + unmasked*1e9
            unmasked = chances >= chances.topk(count, 1).values[:, -1:]
    return ids


@pytest.mark.parametrize("schedule", ["ramp", "constant"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_cached_equals_naive(digits, temperature, schedule):
    pair = conditions(digits, DIGITS)
    settings = dict(temperature=temperature, guidance_schedule=schedule)
    texts = encode(digits, DIGITS), encode(digits, ["", ""])
    fast = digits.generator.generate(*texts, split_generator(0, None, 1, 2), 3., **settings)
    weights = cfg_schedule(3., len(fast), schedule)
    same = digits.generator.net, digits.tokenizer.quantizer, *pair
    slow = generate_naive(*same, split_generator(0, None, 1, 2), weights, temperature)
    assert equal(fast, slow)


@pytest.mark.parametrize("temperature, num_steps", [(0, 1), (1, 1), (0, 4), (1, 4)])
def test_cached_equals_naive_in_several_steps(shapes, temperature, num_steps):
    same = shapes.generator.net, shapes.tokenizer.quantizer, *conditions(shapes, PROMPTS)
    weights = cfg_schedule(3., 6)
    generators = [split_generator(0, None, 1, 2) for _ in range(3)]
    maps = MaskedPredictor(*same, weights)
    *_, fast = stream_masked(maps, generators[0], temperature, num_steps=num_steps)
    assert equal(fast, masked_naive(*same, generators[1], weights, num_steps, temperature))
    if num_steps == 1:
        assert equal(fast, generate_naive(*same, generators[2], weights, temperature))


def test_at_temperature_0_all_seeds_draw_the_same(shapes):
    same = shapes.generator.net, shapes.tokenizer.quantizer, *conditions(shapes, PROMPTS)
    for temperature in (0, 1):
        drawn = []
        for seed in (0, 1):
            maps, generators = MaskedPredictor(*same, [3.]*6), split_generator(seed, None, 1, 2)
            drawn.append(list(stream_masked(maps, generators, temperature, num_steps=4))[-1])
        assert equal(*drawn) == (temperature == 0)


# ---- What older versions saved


def test_old_names_are_translated(tmp_path):
    for name, cls, config in (("digits-var", TextVAR, TextVARConfig),
                              ("shapes-var-bag", MaskedTextVAR, MaskedTextVARConfig)):  # fmt: skip
        folder = bundled_folder(name)/"generator"
        assert json.loads((folder/"config.json").read_text())["format"] == 1
        model = load_model(cls, config, folder)
        assert model.config.format == 2
        model.save_pretrained(tmp_path/name)
        again = load_model(cls, config, tmp_path/name)
        assert equal(model.state_dict().values(), again.state_dict().values())


def test_old_weights_are_not_taken_for_new_ones():
    with pytest.raises(ValueError, match="t2i.load"):
        VARConfig(format=1)
    with pytest.raises(ValueError, match="t2i.load"):  # it would start from random weights
        TextVAR.from_pretrained(bundled_folder("digits-var")/"generator")


def test_masked_weights_are_no_text_var():
    with pytest.raises(T2IError, match="embed.said"):
        load_model(TextVAR, TextVARConfig, bundled_folder("shapes-var-bag")/"generator")


# ---- A run and its tokenizer


def tokenizer(folder, seed=0):
    return train("digits-msvq", folder, (*SHORT, f"train.seed={seed}", "data.cache=0"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A generator's run in a folder of its own, and beside it its tokenizer's, by relative paths"
    monkeypatch.chdir(tmp_path)
    tokenizer("tok")
    overrides = (*SHORT, "tokenizer=tok", "data.cache=0", "sample_guidance_schedule=constant")
    return train("digits-var", "var", overrides)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_loads_from_any_folder(run, tmp_path, monkeypatch):
    images = t2i.load(run, "cpu")(DIGITS, seed=0).images
    (tmp_path/"other").mkdir()
    monkeypatch.chdir(tmp_path/"other")
    assert t2i.load(tmp_path/"var", "cpu")(DIGITS, seed=0).images == images
    shutil.copytree(tmp_path/"tok", tmp_path/"moved"/"tok")
    shutil.copytree(tmp_path/"var", tmp_path/"moved"/"var")
    shutil.rmtree(tmp_path/"tok")
    moved = t2i.load(tmp_path/"moved"/"var", "cpu")
    assert moved(DIGITS, seed=0).images == images and moved.tokenizer_name == ""
    with pytest.raises(T2IError, match="tokenizer of .*var is gone") as e:
        t2i.load(tmp_path/"var", "cpu")
    one_line(e)


def test_a_run_refuses_another_tokenizer(run):
    shutil.rmtree("tok")
    tokenizer("tok", seed=1)
    for use in (lambda: t2i.load(run, "cpu"), lambda: train("digits-var", run, resume=True)):
        with pytest.raises(T2IError, match="was trained with tokenizer tok") as e:
            use()
        assert "put the right one there" in one_line(e)
    with pytest.raises(T2IError, match="digits-msvq is another"):
        train("digits-var", run, ("tokenizer=digits-msvq",), resume=True)


def test_a_bundled_name_stays_bundled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train("digits-var", "var", (*SHORT, "data.cache=0"))
    before = t2i.load(run, "cpu")
    tokenizer("run")
    os.rename("run", "digits-msvq")  # a folder of that name
    after = t2i.load(run, "cpu")
    assert after.tokenizer_name == "digits-msvq"
    assert after(DIGITS, seed=0).images == before(DIGITS, seed=0).images


def test_a_start_that_failed_binds_nothing(tmp_path):
    "Without a checkpoint a run is new, whatever parts.json says"
    part = dict(name="digits-msvq", path=None, fingerprint="0"*16)
    (tmp_path/"parts.json").write_text(json.dumps(dict(tokenizer=part)))
    train("digits-var", tmp_path, (*SHORT, "data.cache=0"))
    t2i.load(tmp_path, "cpu")


def test_settings_of_a_run_become_the_model_s(run, tmp_path):
    pipe = t2i.load(run, "cpu")
    assert pipe.defaults["guidance_schedule"] == "constant"
    pipe.save_pretrained(tmp_path/"saved")
    assert t2i.load(tmp_path/"saved", "cpu").defaults == pipe.defaults


@pytest.mark.parametrize("recipe", ["shapes-var", "digits-var"])
def test_only_a_multi_scale_tokenizer_will_do(tmp_path, recipe):
    with pytest.raises(T2IError, match="shapes-vqgan is a VQGAN: VAR needs a multi-scale") as e:
        train(recipe, tmp_path/"run", (*SHORT, "tokenizer=shapes-vqgan"))
    one_line(e)


def test_a_recipe_does_not_contradict_its_tokenizer(tmp_path):
    with pytest.raises(T2IError, match="model.codebook_size is 77, but must be 256"):
        train("digits-var", tmp_path/"run", (*SHORT, "model.codebook_size=77"))
    tree = TextVARTask.Config().model
    assert (tree.scales, tree.codebook_size, tree.code_dim, tree.text_width) == (None,)*4


def test_training_starts_from_bundled_weights(tmp_path):
    "Whose names are old"
    overrides = (*SHORT, "train.init_from=digits-var", "train.lr=1e-9", "data.cache=0")
    run = train("digits-var", tmp_path/"run", overrides)
    a = t2i.load(run, "cpu").generator.state_dict()
    b = t2i.load("digits-var", "cpu").generator.state_dict()
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in b)


# ---- Cross-attention beside a frozen VAR


def test_a_pooled_model_has_gradients_for_all_its_weights():
    sizes = dict(depth=1, width=8, heads=2, num_classes=None)
    config = PooledTextVARConfig((1, 2), 5, 3, text_width=6, **sizes)
    encoder = FrozenCLIPEncoder(FrozenCLIPConfig(clip_width=4, clip_embed_dim=3, width=6))
    generator = PooledTextVAR(config)
    model = torch.nn.ModuleDict(dict(proj=generator.cond_proj, encoder=encoder))
    model.null_embed = generator.null_embed
    given = TextFeatures(torch.randn(2, 3, 4), torch.ones(2, 3).bool(), torch.randn(2, 3))
    generator.condition(encoder(None, None, given)).vector.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # as DDP needs it


def test_what_is_added_is_saved_without_its_base(tmp_path):
    pipe = t2i.load("shapes-clip-var", "cpu")
    pipe.save_pretrained(tmp_path/"m")
    saved = read_weights(tmp_path/"m"/"generator"/"model.safetensors")
    assert not [name for name in saved if "cross" not in name and "cond_proj" not in name]
    again = t2i.load(tmp_path/"m", "cpu")
    a, b = [p(PROMPTS, seed=0, output_type="pt").images for p in (pipe, again)]
    assert torch.equal(a, b)
    path = tmp_path/"m"/"generator"/"config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "0"*16}))
    with pytest.raises(T2IError, match="beside other weights than those of shapes-class-var"):
        t2i.load(tmp_path/"m", "cpu")

