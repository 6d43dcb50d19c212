"""The tokenizers against figures of the original implementations.

tests/golden/CASE.json describes how weights and inputs are made (from the names and shapes of the original's entries, never from
ours) and what was recorded in CASE.npz: the modules of taming-transformers, enhancing-transformers and VAR, at the commits named there.
"""
import copy, json, zlib
from pathlib import Path

import numpy as np, pytest, torch
from torch import tensor

from t2i.tokenizers.multiscale import MultiScaleVQVAE
from t2i.tokenizers.vit_vqgan import ViTVQGAN
from t2i.tokenizers.soft_codes import GumbelVQGAN
from t2i.tokenizers.vqgan import VQGAN

GOLDEN = Path(__file__).parent/"golden"
KEPT = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def fill(key, shape):
    "The entry's value: normal draws seeded by its name, scaled by its fan-in; vectors about 0, or about 1 for norms"
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) > 1: return torch.from_numpy(n/np.float32(np.prod(shape[1:])**.5))
    return torch.from_numpy((1 if key.endswith(".weight") else 0) + np.float32(.1)*n)


class Case:
    "One recorded case: weights under their published names, input pictures, arrays"
    def __init__(self, name):
        self.about, self.arrays = json.loads((GOLDEN/f"{name}.json").read_text()), np.load(GOLDEN/f"{name}.npz")
        (self.model,) = self.about["models"].values()
        tables = {"en_pos_embedding": "pos_table", "de_pos_embedding": "pos_table"}
        self.weights = {}
        for key, shape, dtype in self.model["state_dict"]:
            last = key.split(".")[-1]
            if last in tables: self.weights[key] = torch.from_numpy(self.arrays[tables[last]])
            elif last in KEPT or dtype != "float32": self.weights[key] = torch.zeros(shape)
            else: self.weights[key] = fill(key, tuple(shape))
        image = self.about["inputs"]["image"]
        self.images = torch.from_numpy(np.random.RandomState(image["seed"]).uniform(-1, 1, size=image["shape"]).astype(np.float32))

    def same(self, name, got, tolerance=2e-5, relative=False):
        "Compare with a recorded array, of which only a slice may have been kept"
        about, want = self.about["arrays"][name], torch.from_numpy(np.atleast_1d(self.arrays[name]))
        got = torch.as_tensor(got).detach().reshape(about["full_shape"])
        if about["slice"] != "whole": got = got[eval(f"np.s_{about['slice']}")]
        assert got.shape == want.shape, name
        if not want.is_floating_point(): assert torch.equal(got, want), name
        else:
            off = (got-want).abs().max().item()
            assert off <= (1e-4*want.abs().max().item() if relative else tolerance), (name, off)


def gradient(loss, *of): return torch.autograd.grad(loss, of, retain_graph=True)


@pytest.mark.parametrize("name", ["vqgan", "vqgan_gumbel", "vitvqgan", "msvq"])
def test_the_fill_is_the_recorded_one(name):
    case = Case(name)
    for key, first in case.model["fill_check"].items(): assert torch.allclose(case.weights[key].flatten()[:4], tensor(first), atol=1e-7)
    filled = sum(case.weights[k].double().abs().sum().item() for k, _, d in case.model["state_dict"]
                 if d == "float32" and k.split(".")[-1] not in (*KEPT, "en_pos_embedding", "de_pos_embedding"))
    assert abs(filled/case.model["fill_check_sum_abs"]-1) < 1e-9
    first = case.about["inputs"]["image"]["first_values"]
    assert torch.allclose(case.images.flatten()[:len(first)], tensor(first))


def test_vqgan():
    case = Case("vqgan")
    tok = VQGAN.from_official(case.weights)
    case.same("encoder_output", tok.encoder(case.images))
    z = tok.features(case.images).detach().requires_grad_()
    case.same("pre_quant", z)
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids); case.same("quantised", zq)
    case.same("reconstruction", tok(case.images)[0], 5e-5)
    case.same("decoded_from_indices", tok.decode_features(zq), 5e-5)
    assert torch.equal(tok.encode(case.images), ids)
    legacy = losses["commitment"]+.25*losses["codebook"]
    case.same("codebook_loss", legacy, relative=True)
    by_z, by_codes = gradient(legacy, z, tok.quantizer.weight)
    case.same("codebook_loss_grad_pre_quant", by_z, relative=True); case.same("codebook_loss_grad_codebook", by_codes, relative=True)
    case.same("codebook_loss_nonlegacy_grad_pre_quant", gradient(.25*losses["commitment"]+losses["codebook"], z)[0], relative=True)


def test_gumbel_vqgan():
    case = Case("vqgan_gumbel")
    tok = GumbelVQGAN.from_official(case.weights)
    z = tok.features(case.images)
    case.same("pre_quant", z)
    case.same("logits", tok.quantizer.proj(z.movedim(1, -1)).movedim(-1, 1))
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids); case.same("quantised", zq)
    case.same("reconstruction", tok(case.images)[0], 5e-5)
    case.same("kl", losses["kl"], relative=True)


def test_vit_vqgan():
    case = Case("vitvqgan")
    tok = ViTVQGAN.from_official(case.weights, pixel_range=(-1, 1)) # as it was recorded
    case.same("pos_table", ViTVQGAN(tok.config).encoder.positions[None]) # computed, not loaded
    case.same("encoder_output", tok.encoder(case.images))
    z = tok.features(case.images).detach().requires_grad_()
    case.same("pre_quant", z.flatten(2).transpose(1, 2))
    zq, ids, losses = tok.quantize(z)
    case.same("indices", ids); case.same("quantised", zq.flatten(2).transpose(1, 2))
    case.same("decoded", tok.decode_features(zq), 5e-5); case.same("reconstruction", tok(case.images)[0], 5e-5)
    loss = losses["codebook"]+.25*losses["commitment"]
    case.same("quantiser_loss", loss, relative=True)
    by_z, by_codes = gradient(loss, z, tok.quantizer.weight)
    case.same("quantiser_loss_grad_pre_quant", by_z.flatten(2).transpose(1, 2), relative=True)
    case.same("quantiser_loss_grad_codebook", by_codes, relative=True)


def test_multi_scale_vqvae():
    case = Case("msvq")
    tok = MultiScaleVQVAE.from_official(case.weights)
    assert tok.quantizer.phi_indices == case.about["constructor"]["vqvae"]["phi_index_per_scale"]
    z = tok.features(case.images).detach().requires_grad_()
    case.same("f", z)
    zq, ids, losses = tok.quantize(z)
    case.same("indices", torch.cat(ids, 1))
    sums = tok.quantizer.sums(ids)
    case.same("f_hat", sums[-1]); case.same("f_hat_scales", torch.stack(sums)); case.same("vq_loss_f_hat", zq)
    case.same("var_input", tok.quantizer.next_inputs(ids))
    case.same("idx_to_img_scales", torch.stack([tok.decode(ids[:k+1]) for k in range(len(ids))]), 5e-5)
    case.same("idx_to_img", tok.decode(ids), 5e-5); case.same("reconstructed_img", tok.decode(tok.encode(case.images)), 5e-5)
    case.same("forward_rec", tok(case.images)[0], 5e-5)
    loss = losses["codebook"]+.25*losses["commitment"]
    case.same("vq_loss", loss, relative=True)
    by_z, by_codes, *by_phi = gradient(loss, z, tok.quantizer.codebook.weight, *(p.conv.bias for p in tok.quantizer.phi))
    case.same("vq_loss_grad_f", by_z, relative=True); case.same("vq_loss_grad_codebook", by_codes, relative=True)
    case.same("vq_loss_grad_phi_bias", torch.stack(by_phi), relative=True)


@pytest.mark.parametrize("levels, attention, size", [((1, 2), (), (32, 32)), ((1, 1, 2), (16,), (64, 48)), ((2, 1, 1, 2), (8, 16), (64, 64))])
def test_taming_live(levels, attention, size):
    """The original modules with random weights, on sizes and widths that no published model has. In 64-bit numbers they are the same function;
    in 32-bit ones both stray as far from it as from each other (1e-6 to 1e-5 where pixels reach 2 or 3, measured), differently on every kind of CPU"""
    pytest.importorskip("taming", reason="taming-transformers-rom1504 is not installed")
    from taming.modules.diffusionmodules import model
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
    torch.manual_seed(len(levels))
    shape = dict(ch=32, out_ch=3, ch_mult=levels, num_res_blocks=1, attn_resolutions=attention, in_channels=3, resolution=64, z_channels=48, double_z=False)
    convs = dict(encoder=model.Encoder(**shape), decoder=model.Decoder(**shape), quant_conv=torch.nn.Conv2d(48, 48, 1), post_quant_conv=torch.nn.Conv2d(48, 48, 1))
    plain, gumbel = VectorQuantizer2(70, 48, beta=.25), GumbelQuantize(48, 48, 70, straight_through=True)
    plain.embedding.weight.data.normal_()
    images = torch.rand(2, 3, *size)*2-1
    def close(a, b): assert (a-b).abs().max() < 1e-5*max(1, b.abs().max())
    for cls, quantize in ((VQGAN, plain), (GumbelVQGAN, gumbel)):
        parts = {k: m.eval().requires_grad_(False) for k, m in dict(convs, quantize=quantize).items()}
        ours = cls.from_official({f"{k}.{n}": w for k, m in parts.items() for n, w in m.state_dict().items()}, resolution=64)
        z = parts["quant_conv"](parts["encoder"](images))
        close(ours.features(images), z)
        if cls is VQGAN:
            zq, loss, (_, _, ids) = plain(z)
            _, again, losses = ours.quantize(ours.features(images))
            assert torch.equal(again.flatten(), ids.flatten()) and abs(loss-losses["commitment"]-.25*losses["codebook"]) < 1e-5
        else:
            ids = gumbel.proj(z).argmax(1).flatten(1)
            assert torch.equal(ours.encode(images), ids)
            zq = gumbel.embed(ids).movedim(-1, 1).unflatten(2, z.shape[2:])
        close(ours.decode_features(zq), parts["decoder"](parts["post_quant_conv"](zq)))
        exact = {k: copy.deepcopy(parts[k]).double() for k in convs}
        ours.double()
        assert (ours.features(images.double())-exact["quant_conv"](exact["encoder"](images.double()))).abs().max() < 1e-9
        assert (ours.decode_features(zq.double())-exact["decoder"](exact["post_quant_conv"](zq.double()))).abs().max() < 1e-6   # pictures come back in 32 bits
