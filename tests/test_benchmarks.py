"VQGAN+CLIP of the published sizes with random weights: nothing is fetched, and speed is measured."
import math

import pytest

import t2i.benchmarks as benchmarks


@pytest.mark.slow
def test_published_pair_with_random_weights():
    names = "vqgan-imagenet-f16-16384", "ViT-B-32"
    run = benchmarks.dream_run(*names, random_weights=True, device="cpu", size=64, cutouts=2)
    assert run.vqgan.codebook.shape == (16384, 256) and run.clips[0].image_size == 224
    speed = benchmarks.dream_speed(run, repeat=1)
    assert all(math.isfinite(value) and value > 0 for value in speed.values()), speed


def test_random_weights_depend_on_the_seed_alone(monkeypatch):
    tiny = benchmarks.VQGANConfig(
        resolution=32, channels=32, multipliers=(1, 2), attention_levels=(), codebook_size=8)
    monkeypatch.setitem(benchmarks.PUBLISHED_SIZES, "tiny", tiny)
    first, again, other = (benchmarks.random_vqgan("tiny", seed) for seed in (0, 0, 1))
    assert (first.codebook == again.codebook).all()
    assert (first.codebook != other.codebook).any()


def test_names_without_a_known_size_are_refused():
    with pytest.raises(ValueError, match="no size is known for 'shapes-vqgan'"):
        benchmarks.dream_run("shapes-vqgan", "ViT-B-32", random_weights=True)
    with pytest.raises(ValueError, match="no model 'nothing'"):
        benchmarks.random_clip("nothing")
