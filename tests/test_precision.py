"Half precision: models whose weights are in 16 bits, and mixed precision around float32 parts."
import pytest
import torch
import torch.nn as nn

import t2i
from t2i.core import log, warn_once
from t2i.data.shapes import render, sample_scene
from t2i.fid import CLIPNetwork
from t2i.guidance.clip import CLIP, CLIPConfig, load_clip, named_clip
from t2i.tokenizers.losses import adaptive_weight
from t2i.tokenizers.quantize import Codebook
from t2i.tokenizers.training import load_tokenizer

PROMPTS = ["a large red circle on a gray background", "two small green hearts"]


def scenes(count):
    "Images of the shapes world"
    pixels = torch.stack([torch.from_numpy(render(sample_scene(i))) for i in range(count)])
    return pixels.movedim(-1, 1).float()/127.5 - 1


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_are_the_same_in_mixed_precision(cosine):
    torch.manual_seed(0)
    book, z = Codebook(512, 16, cosine), torch.randn(1000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = book.encode(z)
    assert torch.equal(mixed, book.encode(z))


def test_maps_are_the_same_in_mixed_precision():
    tokenizer = load_tokenizer("shapes-msvq")
    with torch.no_grad():
        z = tokenizer.features(scenes(2))
        with torch.autocast("cpu", torch.bfloat16):
            ids, sums = tokenizer.quantizer(z)
        plain = tokenizer.quantizer(z)
    assert torch.equal(torch.cat(ids, 1), torch.cat(plain[0], 1))
    assert torch.equal(sums[-1], plain[1][-1])


@pytest.mark.parametrize("name", ["shapes-vqgan", "shapes-vit-vqgan", "shapes-msvq"])
def test_tokenizers_in_half_precision_read_images(name):
    tokenizer, images = load_tokenizer(name), scenes(2)
    error = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    half = tokenizer.bfloat16()
    assert (half.decode(half.encode(images)) - images).square().mean() < 1.2*error + .002


def test_a_clip_in_half_precision_reads_images():
    clip, images = load_clip("shapes-clip", "cpu"), scenes(2)
    with torch.no_grad():
        plain = clip.encode_image(images)
        half = clip.bfloat16().encode_image(images)
    assert half.dtype == torch.float32 and (plain*half).sum(1).min() > .99


def test_a_pipeline_in_half_precision_judges_and_is_saved(tmp_path):
    pipe = t2i.load("shapes-var", "cpu").bfloat16()
    out = pipe(PROMPTS[0], seed=0, rerank=2, judge="both", clip="shapes-clip", num_steps=1)
    assert len(out.images) == 1 and len(out.scores[0]) == 2
    pipe.tokenizer_name = ""
    pipe.save_pretrained(tmp_path/"half")
    assert len(t2i.load(tmp_path/"half", "cpu")(PROMPTS, seed=0, num_steps=1).images) == 2


def test_a_pipeline_saved_in_bfloat16_with_its_tokenizer_is_read(tmp_path):
    pipe = t2i.load("shapes-var", "cpu")
    pipe.tokenizer_name = ""
    pipe.save_pretrained(tmp_path/"m", dtype=torch.bfloat16)
    assert t2i.load(tmp_path/"m", "cpu").tokenizer_name == ""


def two_losses(last, x):
    "A squared error and an adversarial loss of what a last layer paints"
    painted = last(x).float()
    return (painted - x[:,:3]).square().mean(), -1e-2*painted.mean()


def plain_weight(reconstruction, adversarial, layer):
    "The ratio of two gradients, without a scale"
    lengths = []
    for loss in (reconstruction, adversarial):
        lengths.append(torch.autograd.grad(loss, layer, retain_graph=True)[0].norm())
    return (lengths[0]/(lengths[1] + 1e-4)).clamp(max=1e4)


def test_the_adaptive_weight_in_float32_and_float16():
    torch.manual_seed(0)
    x, last = torch.randn(8, 4, 128, 128), nn.Conv2d(4, 3, 3, padding=1)
    losses = two_losses(last, x)
    exact = adaptive_weight(*losses, last.weight)
    assert torch.equal(exact, plain_weight(*losses, last.weight))      # bit for bit
    with torch.autocast("cpu", torch.float16):
        losses = two_losses(last, x)
    assert abs(adaptive_weight(*losses, last.weight)/exact - 1) < .02
    assert abs(plain_weight(*losses, last.weight)/exact - 1) > .1      # without the scale


def test_clip_features_have_a_key_of_all_that_sees():
    from open_clip.model import CLIP as OpenCLIP
    shape = CLIPConfig(vocab_size=100, depth=1, text_depth=1).open_clip()
    model, quick = OpenCLIP(**shape), OpenCLIP(**shape, quick_gelu=True)
    quick.load_state_dict(model.state_dict())

    def key(model, side=64, mean=(.5, .5, .5)):
        return CLIPNetwork(CLIP(model, None, side, mean), "name").key

    first = key(model)
    assert first == key(model)
    others = [key(quick), key(model, side=32), key(model, mean=(.4, .5, .5))]
    model.token_embedding.weight.data += 1                             # which sees nothing
    assert key(model) == first
    model.visual.transformer.resblocks[0].mlp.c_fc.weight.data += 1
    assert len({first, key(model), *others}) == 5


def test_a_file_does_not_tell_its_activation(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: nn.Identity())
    monkeypatch.setattr(log, "propagate", True)
    warn_once.cache_clear()
    (tmp_path/"w.pt").touch()
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-32"):
        named_clip(name, str(tmp_path/"w.pt"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and f"ViT-B-32-quickgelu/{tmp_path}" in said[0]


@pytest.mark.parametrize("name", ["shapes-var", "shapes-var-bag", "shapes-parti"])
def test_numbers_that_overflow_draw_no_image(name):
    pipe = t2i.load(name, "cpu")
    head = pipe.generator.net.head if hasattr(pipe.generator, "net") else pipe.generator.head
    head.weight.data[3, 0] = torch.inf
    with pytest.raises(t2i.T2IError, match="not finite numbers: draw in float32"):
        pipe(PROMPTS[0], seed=0)
