"Caches: own datasets, interruptions, foreign files, and the caller's state as it was."
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import t2i.engine.caches as caches
from t2i import T2IError
from t2i.data.datasets import ImageFiles
from t2i.data.webdataset import ShardFiles, shard_items, write_shards
from t2i.engine.caches import (
    CachedDataset,
    CachedWithSource,
    build_cache,
    build_token_cache,
    dataset_hash,
)
from t2i.guidance.clip import load_clip
from t2i.guidance.clip_cache import TextCache, build_text_cache

CPU = torch.device("cpu")
ABOUT = dict(dataset="a", tokenizer="b")


class Own(Dataset):
    "Images of one number each, without a cache key"
    def __init__(self, size=25, captioned=True):
        self.size = size
        self.captioned = captioned

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        item = dict(image=torch.full((3, 4, 4), i/100))
        return item | dict(caption=f"number {i}") if self.captioned else item


class Keyed(Own):
    def __init__(self, key, **kw):
        super().__init__(**kw)
        self.key = key

    def cache_key(self):
        return self.key


class Tokenizer(nn.Module):
    "Images of one number to two tokens; counts what it encodes"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(100.))
        self.seen = 0
        self.modes = set()

    def encode(self, images):
        self.seen += len(images)
        self.modes.add(self.training)
        ids = (images.mean((1, 2, 3))*self.scale).round().long()
        return [ids[:, None], ids[:, None] + 1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty data folder"
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))
    return tmp_path/"home"/"cache"


def numbers(batch):
    "What the tests keep: the number of each image"
    return dict(x=(batch["image"].mean((1, 2, 3))*100).round().int())


def check(folder, count):
    "A cache holds the numbers from 0 on, in order"
    cached = CachedDataset(folder, count)
    assert [int(item["x"]) for item in cached] == list(range(count))
    assert cached.captions == [f"number {i}" for i in range(count)]


# ---- What is cached


@pytest.mark.parametrize("key", [
    "v1", ("v1", 3), 7, None, [], dict(files=["a", "b"]), torch.ones(3), np.ones(3),
    [torch.zeros(5000)], frozenset("ab"),
])  # fmt: skip
def test_an_own_dataset_is_cached(home, key):
    tokenizer = Tokenizer()
    for _ in range(2):
        folder = build_token_cache(Keyed(key), tokenizer, 25, CPU, shard=10)
    assert tokenizer.seen == 25
    cached = CachedDataset(folder)
    assert [item["tokens"].tolist() for item in cached] == [[i, i+1] for i in range(25)]
    assert cached[3]["caption"] == "number 3" and cached[3]["tokens"].dtype == torch.int64


def test_another_key_is_another_cache():
    changed = torch.zeros(5000)
    changed[2500] = 1e-6
    keys = ["v1", ("v1",), ("v", "1"), "v2", None, [torch.zeros(5000)], [changed], changed]
    names = {dataset_hash(Keyed(key)) for key in keys}
    assert len(names) == len(keys)
    other = type("Other", (Keyed,), {})
    assert dataset_hash(other("v1")) not in names


@pytest.mark.parametrize("dataset", [
    Own(), Subset(Own(), [1, 2]), Subset(Subset(Own(), [1, 2]), [0]), torch.zeros(3),
])  # fmt: skip
def test_a_dataset_without_a_key_says_what_to_add(home, dataset):
    with pytest.raises(T2IError, match=r"cannot be cached: give it a method cache_key\(\)") as e:
        build_token_cache(dataset, Tokenizer(), 1, CPU)
    assert type(dataset).__name__ in str(e.value) or "Own" in str(e.value)
    assert not home.exists()


def test_images_without_captions(home):
    folder = build_token_cache(Keyed("k", captioned=False), Tokenizer(), 25, CPU)
    assert CachedDataset(folder).captions == [""]*25


def test_another_tokenizer_is_another_cache(home):
    tokenizer = Tokenizer()
    folders = {build_token_cache(Keyed("k"), tokenizer, 2, CPU)}
    tokenizer.config = dict(pixel_range=(0, 1))  # the weights are the same
    folders.add(build_token_cache(Keyed("k"), tokenizer, 2, CPU))
    tokenizer.scale.data += 1e-4
    folders.add(build_token_cache(Keyed("k"), tokenizer, 2, CPU))
    assert len(folders) == 3


@pytest.mark.parametrize("count", [0, -1, 26])
def test_a_count_that_the_dataset_does_not_have(tmp_path, count):
    with pytest.raises(ValueError, match="count must be between 1 and 25"):
        build_cache(tmp_path/"c", ABOUT, Own(), count, numbers)
    assert not (tmp_path/"c").exists()


# ---- Interruptions


def child(task):
    "Runs a task in a child process; returns the signal that ended it, or 0"
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    task()
    os._exit(0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("image", [0, 7, 10, 19, 24])
def test_a_killed_cache_goes_on(tmp_path, image):
    def deadly(batch):
        if int(numbers(batch)["x"][-1]) >= image:
            die()
        return numbers(batch)

    def task():
        build_cache(tmp_path/"c", ABOUT, Own(), 25, deadly, shard=10, batch_size=1)

    assert child(task) == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"c").glob("*.safetensors")}
    assert len(before) == image//10
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=10)
    check(tmp_path/"c", 25)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "a whole shard is made anew"


@pytest.mark.parametrize("writer", ["write_text", "save_file"])
def test_a_cache_killed_while_it_writes_goes_on(tmp_path, writer):
    def task():
        def half(*args, **kw):
            write(*args, **kw)
            die()

        owner = caches.Path if writer == "write_text" else caches
        write = getattr(owner, writer)
        setattr(owner, writer, half)
        build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=10)

    assert child(task) == -signal.SIGKILL
    assert list((tmp_path/"c").glob(".*.tmp"))
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=10)
    check(tmp_path/"c", 25)


def test_an_error_keeps_the_whole_shards(tmp_path):
    def broken(batch):
        if numbers(batch)["x"][0] >= 20:
            raise KeyboardInterrupt
        return numbers(batch)

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path/"c", ABOUT, Own(), 25, broken, shard=10)
    names = sorted(p.name for p in (tmp_path/"c").iterdir())
    shards = ["000000000-000000010.safetensors", "000000010-000000020.safetensors"]
    assert names == [*shards, "cache.json"]


@pytest.mark.parametrize("shard", [3, 7, 10, 25, 100])
def test_a_cache_goes_on_with_other_shards(tmp_path, shard):
    build_cache(tmp_path/"c", ABOUT, Own(), 20, numbers, shard=10)
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=shard)
    check(tmp_path/"c", 25)
    check(tmp_path/"c", 4)


# ---- Foreign and damaged files


def test_foreign_files_do_no_harm(tmp_path):
    folder = tmp_path/"c"
    folder.mkdir()
    (folder/".DS_Store").touch()
    build_cache(folder, ABOUT, Own(), 25, numbers, shard=10)
    for name in ("._000000000-000000010.safetensors", "notes.safetensors", "Thumbs.db", "1-2.txt",
                 "000000000-000000010 (copy).safetensors"):
        (folder/name).write_bytes(b"foreign")
    build_cache(folder, ABOUT, Own(), 25, numbers, shard=10)
    check(folder, 25)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "null"])
def test_a_damaged_description_is_named(tmp_path, content):
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers)
    (tmp_path/"c"/"cache.json").write_text(content)
    with pytest.raises(T2IError, match="cache.json cannot be read"):
        build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers)


def test_other_contents_are_refused_and_left_alone(tmp_path):
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers)
    before = {p: p.read_bytes() for p in (tmp_path/"c").iterdir()}
    with pytest.raises(T2IError, match="made with another dataset and another transform"):
        build_cache(tmp_path/"c", ABOUT | dict(dataset="x", transform="y"), Own(), 25, numbers)
    with pytest.raises(T2IError, match="is no cache"):
        build_cache(tmp_path, ABOUT, Own(), 25, numbers)
    assert {p: p.read_bytes() for p in (tmp_path/"c").iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"x"*99])
def test_a_damaged_shard_is_named_in_reading_and_made_anew_in_filling(tmp_path, content):
    folder = build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=10)
    shard = folder/"000000010-000000020.safetensors"
    shard.write_bytes(content)
    with pytest.raises(T2IError, match="000000010-000000020.safetensors cannot be read"):
        CachedDataset(folder)
    build_cache(folder, ABOUT, Own(), 25, numbers, shard=10)
    check(folder, 25)


def test_a_cache_that_is_too_short_or_not_there(tmp_path):
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers)
    with pytest.raises(T2IError, match="holds 25 of 26 items"):
        CachedDataset(tmp_path/"c", 26)
    with pytest.raises(T2IError, match="holds 0 of its items"):
        CachedDataset(tmp_path/"nothing")


# ---- The caller's state, and the bar


def test_the_callers_state_is_as_it_was(home):
    tokenizer = Tokenizer()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    folder = build_token_cache(Keyed("k"), tokenizer, 25, CPU, shard=10)
    assert torch.equal(torch.rand(3), expected)
    assert tokenizer.training and tokenizer.modes == {False}
    assert tokenizer.scale.requires_grad and torch.is_grad_enabled()
    assert not CachedDataset(folder)[0]["tokens"].requires_grad


class Bar:
    "Stands in for tqdm"
    made = []

    def __init__(self, iterable=None, total=None, unit=None, **kw):
        assert iterable is None
        self.total = total
        self.unit = unit
        self.done = []
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        "Nothing to close"

    def update(self, count):
        self.done.append(count)


@pytest.mark.parametrize("there", [0, 10, 25])
def test_one_bar_counts_items(tmp_path, monkeypatch, there):
    if there:
        build_cache(tmp_path/"c", ABOUT, Own(), there, numbers, shard=10)
    monkeypatch.setattr(caches, "progress", Bar)
    monkeypatch.setattr(Bar, "made", [])
    build_cache(tmp_path/"c", ABOUT, Own(), 25, numbers, shard=10, batch_size=4)
    (bar,) = Bar.made
    assert (bar.total, bar.unit, sum(bar.done)) == (25, "item", 25)
    assert bar.done[0] == (10 if there else 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_a_cache(tmp_path, workers):
    def kept(batch):
        x = numbers(batch)["x"]
        return dict(x=x, yes=x > 3, row=x[:, None].half().expand(-1, 2))

    folder = build_cache(tmp_path/"c", ABOUT, Own(), 25, kept, shard=10, workers=workers)
    cached = CachedDataset(folder)
    assert cached[24]["x"] == 24  # a file is open when the processes start
    batches = list(DataLoader(cached, batch_size=5, num_workers=workers))
    assert torch.cat([b["x"] for b in batches]).tolist() == list(range(25))
    kinds = [batches[0][k].dtype for k in ("x", "yes", "row")]
    assert kinds == [torch.int64, torch.bool, torch.float32]
    assert json.loads((folder/"cache.json").read_text()) == ABOUT
    with pytest.raises(IndexError):
        cached[25]


# ---- Captions


@pytest.fixture(scope="module")
def clip():
    return load_clip("shapes-clip", "cpu")


TEXTS = [f"a {size} {color} {shape}" for size in ("small", "large") for color in ("red", "green")
         for shape in ("circle", "square", "star", "heart")]


def check_texts(folder, clip):
    "A text cache holds each caption once, with its own features"
    cache = TextCache(folder)
    assert cache.captions == TEXTS
    for text in TEXTS:
        right = clip.text_features([text])
        row = cache[cache.index[text]]
        torch.testing.assert_close(row["tokens"], right.tokens[right.mask], atol=4e-3, rtol=0)
        torch.testing.assert_close(row["pooled"], right.pooled[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("shard", [2, 3, 6, 100])
def test_a_torn_text_shard_is_removed_though_the_next_call_divides_otherwise(tmp_path, clip, shard):
    folder = build_text_cache(TEXTS, clip, tmp_path/"c", shard=6)
    torn = folder/"000000006-000000012.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    build_text_cache(TEXTS, clip, folder, shard=shard)
    check_texts(folder, clip)


def test_a_text_cache_skips_overlapping_shards(tmp_path, clip):
    folder = build_text_cache(TEXTS, clip, tmp_path/"c", shard=6)
    other = build_text_cache(TEXTS, clip, tmp_path/"other", shard=4)
    name = "000000004-000000008.safetensors"
    (other/name).rename(folder/name)
    check_texts(folder, clip)


def write_damaged(folder):
    "A shard of four images of one shade each, two captions each; the second image is damaged"
    for i in range(4):
        Image.new("RGB", (8, 8), (60*i,)*3).save(folder/f"{i}.png")
        (folder/f"{i}.txt").write_text(f"shade {i}\n")
    items = [(folder/f"{i}.png", [f"shade {i}", f"gray {i}"]) for i in range(4)]
    (shard,) = write_shards(ImageFiles(items, 8), folder/"shards")
    place, _ = shard_items(shard)[1]
    data = bytearray(shard.read_bytes())
    data[place.offset:place.offset+20] = bytes(20)
    shard.write_bytes(data)
    return shard


def test_a_cache_filled_with_a_damaged_image_pairs_its_replacement(tmp_path):
    shard = write_damaged(tmp_path)

    def read():
        return ShardFiles(shard_items(shard), 8)

    folder = build_token_cache(read(), Tokenizer(), 8, CPU, folder=tmp_path/"cache")
    for get in (lambda data, i: data[i], lambda data, i: data.augmented(i, torch.Generator())):
        cached = CachedWithSource(folder, 8, read())              # as a later process opens it
        for i in range(8):
            item = get(cached, i)
            shade = round((item["tokens"][0].item()/100+1)*127.5/60)
            assert shade == (i%4 if i%4 != 1 else 2)              # the next one took its place
            assert item["caption"] in (f"shade {shade}", f"gray {shade}")
        assert cached.source.caption(1) == "shade 2"
