"""The tokenizers and generators against figures of the original implementations.

tests/golden/CASE.json describes how weights and inputs are made: from the names and shapes of the
original's entries, never from ours. It also names what was recorded in CASE.npz, with the modules
of taming-transformers, enhancing-transformers and VAR at the commits named there.
"""
import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import tensor

from t2i.core import T2IError, fold_in
from t2i.engine.checkpoints import CheckpointError
from t2i.generators.text_var import PooledTextVAR, TextVAR
from t2i.generators.var import VAR, MapPredictor
from t2i.sampling import cfg_schedule
from t2i.text import TextFeatures
from t2i.tokenizers.multiscale import MultiScaleVQVAE
from t2i.tokenizers.soft_codes import GumbelVQGAN
from t2i.tokenizers.vit_vqgan import ViTVQGAN
from t2i.tokenizers.vqgan import VQGAN

GOLDEN = Path(__file__).parent/"golden"
KEPT = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
TABLES = {"en_pos_embedding": "pos_table", "de_pos_embedding": "pos_table"}


def fill(key, shape):
    "Normal draws seeded by the entry's name: scaled by its fan-in; vectors about 0, norms about 1"
    state = np.random.RandomState(zlib.crc32(key.encode()))
    draws = state.standard_normal(shape).astype(np.float32)
    if len(shape) > 1:
        return torch.from_numpy(draws/np.float32(np.prod(shape[1:])**.5))
    middle = 1 if key.endswith(".weight") else 0
    return torch.from_numpy(middle + np.float32(.1)*draws)


def is_filled(key, dtype):
    "Whether the recorded model's entry was filled with `fill`"
    return dtype == "float32" and key.split(".")[-1] not in (*KEPT, *TABLES)


class Case:
    "One recorded case: weights under their published names, input images, arrays"
    def __init__(self, name, model=None):
        self.about = json.loads((GOLDEN/f"{name}.json").read_text())
        self.arrays = np.load(GOLDEN/f"{name}.npz")
        models = self.about["models"]
        self.model = models[model] if model else next(iter(models.values()))
        self.weights = {}
        for key, shape, dtype in self.model["state_dict"]:
            self.weights[key] = self.weight(key, tuple(shape), dtype)
        image = self.about["inputs"]["image"]
        pixels = np.random.RandomState(image["seed"]).uniform(-1, 1, size=image["shape"])
        self.images = torch.from_numpy(pixels.astype(np.float32))

    def weight(self, key, shape, dtype):
        last = key.split(".")[-1]
        if last in TABLES:
            return torch.from_numpy(self.arrays[TABLES[last]])
        return fill(key, shape) if is_filled(key, dtype) else torch.zeros(shape)

    def same(self, name, got, tolerance=2e-5, relative=False):
        "Compare with a recorded array, of which only a slice may have been kept"
        about = self.about["arrays"][name]
        want = torch.from_numpy(np.atleast_1d(self.arrays[name]))
        got = torch.as_tensor(got).detach().reshape(about["full_shape"])
        if about["slice"] != "whole":
            got = got[eval(f"np.s_{about['slice']}")]
        assert got.shape == want.shape, name
        if not want.is_floating_point():
            assert torch.equal(got, want), name
            return
        difference = (got-want).abs().max().item()
        limit = 1e-4*want.abs().max().item() if relative else tolerance
        assert difference <= limit, (name, difference)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("name, model", [
    ("vqgan", None), ("vqgan_gumbel", None), ("vitvqgan", None), ("msvq", None), ("var", "var"),
    ("var_clip", "var"),
])
def test_the_fill_is_the_recorded_one(name, model):
    case = Case(name, model)
    for key, first in case.model["fill_check"].items():
        assert torch.allclose(case.weights[key].flatten()[:4], tensor(first), atol=1e-7)
    filled = [key for key, _, dtype in case.model["state_dict"] if is_filled(key, dtype)]
    total = sum(case.weights[key].double().abs().sum().item() for key in filled)
    assert abs(total/case.model["fill_check_sum_abs"]-1) < 1e-9
    first = case.about["inputs"]["image"]["first_values"]
    assert torch.allclose(case.images.flatten()[:len(first)], tensor(first))


def test_vqgan():
    case = Case("vqgan")
    tok = VQGAN.from_official(case.weights)
    case.same("encoder_output", tok.encoder(case.images))
    z = tok.features(case.images).detach().requires_grad_()
    case.same("pre_quant", z)
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids)
    case.same("quantised", zq)
    case.same("reconstruction", tok(case.images)[0], 5e-5)
    case.same("decoded_from_indices", tok.decode_features(zq), 5e-5)
    assert torch.equal(tok.encode(case.images), ids)
    legacy = losses["commitment"]+.25*losses["codebook"]
    case.same("codebook_loss", legacy, relative=True)
    by_z, by_codes = gradient(legacy, z, tok.quantizer.weight)
    case.same("codebook_loss_grad_pre_quant", by_z, relative=True)
    case.same("codebook_loss_grad_codebook", by_codes, relative=True)
    (by_z,) = gradient(.25*losses["commitment"]+losses["codebook"], z)
    case.same("codebook_loss_nonlegacy_grad_pre_quant", by_z, relative=True)


def test_gumbel_vqgan():
    case = Case("vqgan_gumbel")
    tok = GumbelVQGAN.from_official(case.weights)
    z = tok.features(case.images)
    case.same("pre_quant", z)
    case.same("logits", tok.quantizer.proj(z.movedim(1, -1)).movedim(-1, 1))
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids)
    case.same("quantised", zq)
    case.same("reconstruction", tok(case.images)[0], 5e-5)
    case.same("kl", losses["kl"], relative=True)


def test_vit_vqgan():
    def sequence(x):  # (b,d,h,w) -> (b,h*w,d)
        return x.flatten(2).transpose(1, 2)

    case = Case("vitvqgan")
    tok = ViTVQGAN.from_official(case.weights, pixel_range=(-1, 1))  # as it was recorded
    computed = ViTVQGAN(tok.config).encoder.positions[None]  # not loaded
    case.same("pos_table", computed)
    case.same("encoder_output", tok.encoder(case.images))
    z = tok.features(case.images).detach().requires_grad_()
    case.same("pre_quant", sequence(z))
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids)
    case.same("quantised", sequence(zq))
    case.same("decoded", tok.decode_features(zq), 5e-5)
    case.same("reconstruction", tok(case.images)[0], 5e-5)
    loss = losses["codebook"]+.25*losses["commitment"]
    case.same("quantiser_loss", loss, relative=True)
    by_z, by_codes = gradient(loss, z, tok.quantizer.weight)
    case.same("quantiser_loss_grad_pre_quant", sequence(by_z), relative=True)
    case.same("quantiser_loss_grad_codebook", by_codes, relative=True)


def test_multi_scale_vqvae():
    case = Case("msvq")
    tok = MultiScaleVQVAE.from_official(case.weights)
    recorded = case.about["constructor"]["vqvae"]["phi_index_per_scale"]
    assert tok.quantizer.phi_indices == recorded
    z = tok.features(case.images).detach().requires_grad_()
    case.same("f", z)
    zq, ids, losses = tok.quantize(z)
    case.same("indices", torch.cat(ids, 1))
    sums = tok.quantizer.sums(ids)
    case.same("f_hat", sums[-1])
    case.same("f_hat_scales", torch.stack(sums))
    case.same("vq_loss_f_hat", zq)
    case.same("var_input", tok.quantizer.next_inputs(ids))
    images = [tok.decode(ids[:k+1]) for k in range(len(ids))]
    case.same("idx_to_img_scales", torch.stack(images), 5e-5)
    case.same("idx_to_img", tok.decode(ids), 5e-5)
    case.same("reconstructed_img", tok.decode(tok.encode(case.images)), 5e-5)
    case.same("forward_rec", tok(case.images)[0], 5e-5)
    loss = losses["codebook"]+.25*losses["commitment"]
    case.same("vq_loss", loss, relative=True)
    biases = [phi.conv.bias for phi in tok.quantizer.phi]
    by_z, by_codes, *by_phi = gradient(loss, z, tok.quantizer.codebook.weight, *biases)
    case.same("vq_loss_grad_f", by_z, relative=True)
    case.same("vq_loss_grad_codebook", by_codes, relative=True)
    case.same("vq_loss_grad_phi_bias", torch.stack(by_phi), relative=True)


# ---- Next-scale transformers


def levels(case):
    "The level of each token, as the published files have it"
    sides = case.about["constructor"]["var"]["patch_nums"]
    return torch.cat([torch.full((side*side,), i) for i, side in enumerate(sides)])[None]


def split(tokens):
    "Recorded ids of all maps side by side -> a list of maps"
    sides = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    return list(torch.as_tensor(tokens).split([side*side for side in sides], 1))


def guided_logits(model, condition, unconditional, ids, cfg):
    "The logits of every map as sampling computes them, with the recorded ids in between"
    weights = cfg_schedule(1+cfg, len(ids))
    maps = MapPredictor(model.net, model.tokenizer.quantizer, condition, unconditional, weights)
    logits = []
    for tokens in ids:
        logits.append(maps.logits())
        maps.add(model.tokenizer.quantizer.codebook.decode(tokens))
    return torch.cat(logits, 1), maps.total


@torch.no_grad()
def compare_teacher_forcing(case, model, given):
    ids = model.tokenizer.encode(case.images)
    case.same("teacher_indices", torch.cat(ids, 1))
    case.same("teacher_var_input", model.tokenizer.quantizer.next_inputs(ids))
    logits = model(given, ids)
    case.same("logits", logits)
    case.same("logits_argmax", logits.argmax(-1))
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.cat(ids, 1))
    assert abs(loss.item()/case.about["scalars"]["cross_entropy_mean"]-1) < 1e-5


@torch.no_grad()
def compare_greedy(case, model, given, unconditional, cfg, ids):
    name = f"greedy_cfg{cfg:g}"
    case.same(f"{name}_ids", torch.cat(ids, 1))
    conditions = model.condition(given), model.condition(unconditional)
    logits, total = guided_logits(model, *conditions, ids, cfg)
    case.same(f"{name}_guided_logits", logits, 5e-5)
    case.same(f"{name}_f_hat", total)
    case.same(f"{name}_img", model.tokenizer.decode(ids)/2+.5, 5e-5)


@pytest.fixture(scope="module")
def var_case():
    case = Case("var", "var")
    case.weights["lvl_1L"] = levels(case)
    return case, MultiScaleVQVAE.from_official(Case("var", "vqvae").weights)


def test_var(var_case):
    case, tok = var_case
    var = VAR.from_official(case.weights, tokenizer=tok)
    labels = tensor(case.about["inputs"]["labels"])
    compare_teacher_forcing(case, var, labels)
    for cfg in (1.5, 0.):
        for greedy in (dict(top_k=1), dict(temperature=0)):
            ids = var.generate(labels, cfg=cfg, generator=fold_in(0), **greedy)
            compare_greedy(case, var, labels, tensor([10, 10]), cfg, ids)


def test_var_clip(var_case):
    _, tok = var_case
    case = Case("var_clip", "var")
    case.weights["lvl_1L"] = levels(case)
    var = TextVAR.from_official(case.weights, tokenizer=tok)
    assert isinstance(var, PooledTextVAR)
    text = torch.from_numpy(case.arrays["text_embedding"])
    compare_teacher_forcing(case, var, text)
    features = TextFeatures(text[:, None], torch.ones(2, 1).bool(), text)
    ids = var.generate(features, cfg=4., top_k=1)
    compare_greedy(case, var, text, var.null_embed.expand(2, -1), 4., ids)


def test_var_and_its_schedule(var_case):
    "The schedule is read from the file; another tokenizer and another schedule are refused"
    case, tok = var_case
    assert VAR.from_official(case.weights).config.scales == tok.scales
    stripped = {k: w for k, w in case.weights.items() if k != "lvl_1L"}
    assert VAR.from_official(stripped).config.scales == tok.scales
    blank = stripped | {"lvl_1L": torch.zeros(1, 680, dtype=torch.long)}
    assert VAR.from_official(blank).config.scales == tok.scales
    vqvae = Case("var", "vqvae").weights
    other = MultiScaleVQVAE.from_official(vqvae, scales=(1, 2, 4, 8, 16))
    with pytest.raises(T2IError, match="scales"):
        VAR.from_official(case.weights, tokenizer=other)
    with pytest.raises(CheckpointError, match="looks like a VAR transformer, not a VAR-CLIP"):
        TextVAR.from_official(case.weights)


# ---- The original modules of taming-transformers, with random weights, on sizes and widths that
# no published model has. In 64-bit numbers they are the same function as ours. In 32-bit ones both
# stray as far from it as from each other (1e-6 to 1e-5 where pixels reach 2 or 3, measured),
# differently on every kind of CPU.


def taming_parts(levels, attention):
    "Encoder, decoder and the two convolutions around the codes, as taming-transformers writes them"
    from taming.modules.diffusionmodules import model

    shape = dict(ch=32, out_ch=3, ch_mult=levels, num_res_blocks=1, attn_resolutions=attention)
    shape |= dict(in_channels=3, resolution=64, z_channels=48, double_z=False)
    return {
        "encoder": model.Encoder(**shape),
        "decoder": model.Decoder(**shape),
        "quant_conv": torch.nn.Conv2d(48, 48, 1),
        "post_quant_conv": torch.nn.Conv2d(48, 48, 1),
    }


def assert_close(a, b):
    assert (a-b).abs().max() < 1e-5*max(1, b.abs().max())


def vector_codes(quantizer, ours, z, images):
    "taming's quantized features, after comparing ids and losses with ours"
    zq, loss, (_, _, ids) = quantizer(z)
    _, our_ids, losses = ours.quantize(ours.features(images))
    assert torch.equal(our_ids.flatten(), ids.flatten())
    assert abs(loss-losses["commitment"]-.25*losses["codebook"]) < 1e-5
    return zq


def gumbel_codes(quantizer, ours, z, images):
    "taming's features of the likeliest codes, after comparing the ids with ours"
    ids = quantizer.proj(z).argmax(1).flatten(1)
    assert torch.equal(ours.encode(images), ids)
    return quantizer.embed(ids).movedim(-1, 1).unflatten(2, z.shape[2:])


def assert_same_function(ours, parts, images, zq):
    "Both in 64-bit numbers"
    exact = {name: copy.deepcopy(part).double() for name, part in parts.items()}
    ours.double()
    images, zq = images.double(), zq.double()
    want = exact["quant_conv"](exact["encoder"](images))
    assert (ours.features(images)-want).abs().max() < 1e-9
    want = exact["decoder"](exact["post_quant_conv"](zq))
    assert (ours.decode_features(zq)-want).abs().max() < 1e-6  # images come back in 32 bits


@pytest.mark.parametrize("codes", ["vector", "gumbel"])
@pytest.mark.parametrize("levels, attention, size", [
    ((1, 2), (), (32, 32)),
    ((1, 1, 2), (16,), (64, 48)),
    ((2, 1, 1, 2), (8, 16), (64, 64)),
])
def test_taming_live(levels, attention, size, codes):
    pytest.importorskip("taming", reason="taming-transformers-rom1504 is not installed")
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

    torch.manual_seed(len(levels))
    parts = taming_parts(levels, attention)
    if codes == "vector":
        quantizer, our_class, compare = VectorQuantizer2(70, 48, beta=.25), VQGAN, vector_codes
        quantizer.embedding.weight.data.normal_()
    else:
        quantizer = GumbelQuantize(48, 48, 70, straight_through=True)
        our_class, compare = GumbelVQGAN, gumbel_codes
    images = torch.rand(2, 3, *size)*2-1
    weights = {}
    for name, part in {**parts, "quantize": quantizer}.items():
        part.eval().requires_grad_(False)
        weights |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    ours = our_class.from_official(weights, resolution=64)
    z = parts["quant_conv"](parts["encoder"](images))
    assert_close(ours.features(images), z)
    zq = compare(quantizer, ours, z, images)
    assert_close(ours.decode_features(zq), parts["decoder"](parts["post_quant_conv"](zq)))
    assert_same_function(ours, parts, images, zq)
