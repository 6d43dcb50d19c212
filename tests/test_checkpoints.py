"Files from elsewhere: nothing in them runs, and what they claim is checked."
import io
import json
import os
import pickle
import threading
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

import t2i
from t2i import T2IError
from t2i.engine import checkpoints
from t2i.engine.checkpoints import (
    REGISTRY,
    CheckpointError,
    PublishedFile,
    detect_format,
    fetch,
    fingerprint,
    initial_weights,
    load_model,
    load_part,
    load_state_dict_strict,
    read_checkpoint,
    save_part,
    unwrap_names,
)
from t2i.engine.downloads import one_at_a_time
from t2i.engine.files import bundled_folder
from t2i.engine.unpickling import Stub, TensorUnpickler

WEIGHTS = OrderedDict(w=torch.arange(6.).reshape(2, 3), b=torch.ones(2, dtype=torch.float16))


class Call:
    "Pickles as a call of a function"
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Callback:
    "An object of the training program, with state of its own"
    def __init__(self):
        self.best = {"epoch=1": torch.ones(3)}
        self.folder = os.getcwd()


def one_line(error):
    "An error's text, which has one line"
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Nothing in a file runs


def payloads(marker):
    "Objects that would make the file `marker` if they were built"
    shell = Call(os.system, f"touch {marker}")
    system = Call(getattr, Call(__import__, "os"), "system")
    return dict(
        shell=shell,
        evaluated=Call(eval, f"open({str(marker)!r}, 'w')"),
        executed=Call(exec, f"open({str(marker)!r}, 'w')"),
        opened=Call(open, str(marker), "w"),
        imported=Call(__import__, "antigravity"),
        nested=[{"a": (system, shell)}],
        callback=Callback(),
        reader=Call(pickle.loads, pickle.dumps(shell)),
        unbound=Call(io.open, str(marker), "w"),
    )


@pytest.mark.parametrize("name", list(payloads("x")))
def test_payloads_do_nothing(tmp_path, name):
    marker = tmp_path/"marker"
    payload = payloads(marker)[name]
    torch.save(dict(state_dict=WEIGHTS, hyper_parameters=payload, epoch=3), tmp_path/"last.ckpt")
    found = read_checkpoint(tmp_path/"last.ckpt")
    assert not marker.exists()
    assert list(found) == ["w", "b"]
    assert all(torch.equal(found[k], WEIGHTS[k]) for k in found)


def test_a_payload_among_the_weights(tmp_path):
    evil = Call(os.system, f"touch {tmp_path/'marker'}")
    torch.save(dict(state_dict=WEIGHTS | {"evil": evil}), tmp_path/"last.ckpt")
    assert list(read_checkpoint(tmp_path/"last.ckpt")) == ["w", "b"]
    assert not (tmp_path/"marker").exists()


def test_a_script_archive_is_not_run(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path/"x.pt")
    with pytest.raises(T2IError, match="x.pt"):
        read_checkpoint(tmp_path/"x.pt")


# ---- What a file claims is checked


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    "The same archive with its entries changed"
    with zipfile.ZipFile(path) as z:
        entries = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in entries.items():
            z.writestr(name, change(name, data))


def claiming(numbers, size_too):
    "data.pkl of a one-tensor file in which 6 numbers have become many"
    big = b"\x8a\x05" + numbers.to_bytes(5, "little")

    def change(name, data):
        if not name.endswith("data.pkl"):
            return data
        data = data.replace(b"K\x06t", big + b"t")  # the storage
        return data.replace(b"K\x06\x85", big + b"\x85") if size_too else data

    return change


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("size_too", [False, True])
def test_ten_gigabytes_that_are_not_there(tmp_path, size_too, hidden):
    path = tmp_path/"last.ckpt"
    other = Callback() if hidden else 0
    torch.save(dict(state_dict=dict(w=torch.arange(6.)), other=other), path)
    rewritten(path, claiming(2_500_000_000, size_too))
    with pytest.raises(T2IError) as e:
        read_checkpoint(path)
    assert one_line(e)


def test_a_view_beyond_its_storage(tmp_path):
    path = tmp_path/"last.ckpt"
    torch.save(dict(state_dict=dict(w=torch.arange(6.)), other=Callback()), path)

    def seven(name, data):
        return data.replace(b"K\x06\x85", b"K\x07\x85") if name.endswith("data.pkl") else data

    rewritten(path, seven)
    with pytest.raises(T2IError, match="cannot read"):
        read_checkpoint(path)


def test_a_storage_of_another_size(tmp_path):
    path = tmp_path/"last.ckpt"
    torch.save(dict(state_dict=dict(w=torch.arange(6.)), other=Callback()), path)

    def five(name, data):
        fewer = data.replace(b"K\x06t", b"K\x05t").replace(b"K\x06\x85", b"K\x05\x85")
        return fewer if name.endswith("data.pkl") else data

    rewritten(path, five)
    with zipfile.ZipFile(path) as archive:
        with pytest.raises(pickle.UnpicklingError, match="storage 0 has not the size"):
            TensorUnpickler(archive).load()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_checkpoint(path)


def test_a_compressed_storage(tmp_path):
    path = tmp_path/"last.ckpt"
    torch.save(dict(w=torch.zeros(100_000), other=Callback()), path)
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(T2IError):
        read_checkpoint(path)


def test_dictionaries_in_a_ring_end(tmp_path):
    ring = {}
    ring["model"] = ring["state_dict"] = ring
    torch.save(ring, tmp_path/"x.pt")
    with pytest.raises(CheckpointError, match="no weights by name"):
        read_checkpoint(tmp_path/"x.pt")


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04", b"not a checkpoint", pickle.dumps(dict(w=[1, 2])),
    b"\x80\x02cos\nsystem\n(S'echo'\ntR.", b"<html>Log in</html>", b"12345678{}",
])  # fmt: skip
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_what_is_no_checkpoint(tmp_path, content, name):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(T2IError, match=name) as e:
        read_checkpoint(tmp_path/name)
    assert one_line(e)


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_files_that_are_cut_short(tmp_path, cut):
    torch.save(dict(w=torch.zeros(1000)), tmp_path/"x.pt")
    save_file(dict(w=torch.zeros(1000)), tmp_path/"x.safetensors")
    for path in (tmp_path/"x.pt", tmp_path/"x.safetensors"):
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(CheckpointError, match="cut short"):
            read_checkpoint(path)


# ---- Wrappings


@pytest.mark.parametrize("wrap", [
    lambda w: w, lambda w: {"state_dict": w}, lambda w: {"trainer": {"var_wo_ddp": w, "epoch": 1}},
    lambda w: {"model": {"state_dict": w}}, lambda w: {"state_dict": {}, "module": w},
    lambda w: {"model": {"name": "VAR"}, "trainer": {"module": {"model": w}}},
])  # fmt: skip
@pytest.mark.parametrize("hidden", [False, True])
def test_wrappings(tmp_path, wrap, hidden):
    odd = {"odd": Callback()} if hidden else {}
    torch.save(wrap(WEIGHTS | odd), tmp_path/"x.pth")
    found = read_checkpoint(tmp_path/"x.pth")
    assert list(found) == ["w", "b"] and found["b"].dtype == torch.float16


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "model.", "first_stage_model.", "module._orig_mod.",
    "_orig_mod.module.", "model.module.", "module.model.", "model._orig_mod.module.model.",
    "module.module.module.", "first_stage_model.model.", "model.first_stage_model._orig_mod.",
    "_fsdp_wrapped_module.model._checkpoint_wrapped_module.",
])  # fmt: skip
def test_names_are_unwrapped_until_nothing_changes(tmp_path, prefix):
    torch.save({prefix+k: w for k, w in WEIGHTS.items()}, tmp_path/"x.pth")
    assert list(read_checkpoint(tmp_path/"x.pth")) == ["w", "b"]


def test_a_compiled_block_inside_a_model():
    names = ["encoder._orig_mod.w", "decoder.blocks.0._orig_mod.module.w"]
    assert list(unwrap_names(dict.fromkeys(names))) == ["encoder.w", "decoder.blocks.0.module.w"]


def test_other_networks_beside_the_one():
    beside = ["model.diffusion_model.x", "first_stage_model.w", "cond_stage_model.y"]
    for wrapper in ("", "module.", "model.module."):
        assert list(unwrap_names({wrapper+k: 0 for k in beside})) == ["w"]
    names = ["model.w", "loss.discriminator.x", "model_ema.decay"]
    assert list(unwrap_names(dict.fromkeys(names))) == ["w", *names[1:]]
    names = ["model.w", "head.w"]
    assert list(unwrap_names(dict.fromkeys(names))) == names


def test_shared_strided_and_empty_tensors(tmp_path):
    base = torch.arange(12.).reshape(3, 4)
    tensors = dict(
        base=base, row=base[1], turned=base.T, parameter=nn.Parameter(base),
        empty=torch.empty(0, 3), yes=torch.tensor(True), number=torch.tensor(3),
    )
    torch.save(tensors | {"odd": Callback()}, tmp_path/"x.pth")
    with zipfile.ZipFile(tmp_path/"x.pth") as z:
        found = TensorUnpickler(z).load()
    assert isinstance(found.pop("odd"), Stub)
    for k, t in tensors.items():
        assert torch.equal(found[k], t.data) and found[k].shape == t.shape, k
    row, whole = found["row"].untyped_storage(), found["base"].untyped_storage()
    assert row.data_ptr() == whole.data_ptr()


def test_a_parameter_with_attributes_of_its_own(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    weight.note = "used by an optimiser"
    torch.save(dict(w=weight, odd=Callback()), tmp_path/"x.pth")
    assert torch.equal(read_checkpoint(tmp_path/"x.pth")["w"], torch.ones(2))


def test_safetensors_under_another_name(tmp_path):
    save_file(WEIGHTS, tmp_path/"x.ckpt")
    torch.save(WEIGHTS, tmp_path/"x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        assert sorted(read_checkpoint(tmp_path/name)) == ["b", "w"]


# ---- Folders of torch.distributed.checkpoint


@pytest.fixture
def shards(tmp_path):
    "A folder as a process writes it; what is no tensor is in a pickle of its own"
    step = Call(os.system, f"touch {tmp_path/'marker'}")
    content = dict(app=dict(model=dict(WEIGHTS), step=step))
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(content, checkpoint_id=tmp_path/"shards", no_dist=True)
    return tmp_path/"shards"


def spoil(folder, change):
    "Change the metadata of a folder"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder/".metadata").write_bytes(pickle.dumps(metadata))


def test_a_folder_of_shards_is_read_and_nothing_runs(shards, tmp_path):
    found = read_checkpoint(shards)
    assert list(found) == ["w", "b"]
    assert all(torch.equal(found[k], WEIGHTS[k]) for k in found)
    assert found["b"].dtype == torch.float16
    assert not (tmp_path/"marker").exists()


@pytest.mark.parametrize("name", list(payloads("x")))
def test_payloads_in_metadata_do_nothing(shards, tmp_path, name):
    marker = tmp_path/"marker"
    spoil(shards, lambda metadata: vars(metadata).update(planner_data=payloads(marker)[name]))
    with pytest.raises(CheckpointError, match="which it never needs") as e:
        read_checkpoint(shards)
    assert str(shards) in one_line(e) and not marker.exists()


def test_a_payload_in_the_place_of_a_tensor(shards, tmp_path):
    torch.save(Call(os.system, f"touch {tmp_path/'marker'}"), shards/"__9_0.distcp")

    def change(metadata):
        place, = [place for at, place in metadata.storage_data.items() if at.fqn == "app.model.w"]
        size = (shards/"__9_0.distcp").stat().st_size
        vars(place).update(relative_path="__9_0.distcp", offset=0, length=size)

    spoil(shards, change)
    with pytest.raises(CheckpointError, match="is damaged") as e:
        read_checkpoint(shards)
    assert one_line(e) and not (tmp_path/"marker").exists()


@pytest.mark.parametrize("size, says", [
    ((2, 4), "6 numbers are stored of a tensor of 8"), ((10**9, 10**9), "6 numbers are stored"),
    (("a",), "cannot read"), (None, "cannot read"),
])  # fmt: skip
def test_a_shape_that_is_not_stored(shards, size, says):
    def change(metadata):
        metadata.state_dict_metadata["app.model.w"].size = size

    spoil(shards, change)
    with pytest.raises(CheckpointError, match=says) as e:
        read_checkpoint(shards)
    assert one_line(e)


def test_a_shard_outside_of_the_folder(shards):
    def change(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = f"../shards/{place.relative_path}"

    spoil(shards, change)
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        read_checkpoint(shards)


def test_shards_beside_a_config_are_a_model(tmp_path):
    line = Line(LineConfig())
    save_part(line, tmp_path/"line")
    (tmp_path/"line"/"model.safetensors").unlink()
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(line.state_dict(), checkpoint_id=tmp_path/"line", no_dist=True)
    found = load_part(dict(line=(Line, LineConfig)), tmp_path/"line")
    assert torch.equal(found.slope.weight, line.slope.weight) and found.count == 2**40
    assert initial_weights(tmp_path/"line").keys() == line.state_dict().keys()
    with pytest.raises(T2IError, match="looks like no model known here"):
        (tmp_path/"line"/"config.json").unlink()
        t2i.load(tmp_path/"line")


# ---- Saved models


@dataclass
class LineConfig:
    inputs:int=2
    model_type:str="line"
    format:int=3

    def __post_init__(self):
        if self.inputs < 1:
            raise T2IError("inputs must be positive")


class Line(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.slope = nn.Linear(config.inputs, 1)
        self.register_buffer("count", torch.tensor(2**40))


class UpgradedLine(Line):
    "Reads format 1 (`width`, and weights without `slope.`) and 2 (`width`)"
    @classmethod
    def upgrade(cls, values, state):
        if values.get("format", 1) < 2:
            state = {f"slope.{k}".replace("slope.count", "count"): w for k, w in state.items()}
        return dict(inputs=values["width"], model_type="line"), state


def saved(folder, values, names=("slope.weight", "slope.bias", "count")):
    "A saved line with these config values and names of weights"
    folder.mkdir()
    (folder/"config.json").write_text(json.dumps(values))
    tensors = torch.ones(1, 2), torch.zeros(1), torch.tensor(7)
    save_file(dict(zip(names, tensors)), folder/"model.safetensors")
    return folder


OLD = ("weight", "bias", "count")


@pytest.mark.parametrize("values, names", [
    (dict(inputs=2, format=3), None), (dict(width=2, format=2), None), (dict(width=2), OLD),
    (dict(width=2, format=1), OLD),
])  # fmt: skip
def test_older_forms_are_translated_on_reading(tmp_path, values, names):
    folder = saved(tmp_path/"line", values, *[names][:bool(names)])
    before = (folder/"config.json").read_bytes()
    line = load_model(UpgradedLine, LineConfig, folder)
    assert (line.config.inputs, line.config.format) == (2, 3) and line.count == 7
    assert (folder/"config.json").read_bytes() == before
    start = initial_weights(folder, line)
    assert sorted(start) == sorted(line.state_dict())


@pytest.mark.parametrize("values, says", [
    (dict(inputs=2, format=3, colour=1), "unknown field 'colour'"), (dict(format=4), "upgrade t2i"),
    (dict(width=2, format=2), "unknown field 'width'"), (dict(format="3"), "format '3'"),
    (dict(inputs="2", format=3), "config.json"), (dict(inputs=0, format=3), "config.json: inputs"),
    (dict(inputs=5, format=3), "does not fit"), ([1], "not a table"), (None, "not a table"),
])  # fmt: skip
def test_spoiled_configs_are_named(tmp_path, values, says):
    saved(tmp_path/"line", values)
    with pytest.raises(CheckpointError, match=says) as e:
        load_model(Line, LineConfig, tmp_path/"line")
    assert "line" in one_line(e)


@pytest.mark.parametrize("kind", [None, "curve", ["line"], 3])
def test_a_kind_that_is_not_known(tmp_path, kind):
    saved(tmp_path/"line", dict(model_type=kind))
    with pytest.raises(CheckpointError, match="unknown model_type"):
        load_part(dict(line=(Line, LineConfig)), tmp_path/"line")


def test_a_saved_part_is_two_files(tmp_path):
    (tmp_path/"line").mkdir()
    (tmp_path/"line"/"README.md").write_text("my notes")
    line = Line(LineConfig())
    save_part(line, tmp_path/"line")
    found = load_part(dict(line=(Line, LineConfig)), tmp_path/"line")
    assert torch.equal(found.slope.weight, line.slope.weight.half().float())
    assert found.count == 2**40 and line.slope.weight.dtype == torch.float32
    assert (tmp_path/"line"/"README.md").read_text() == "my notes"
    save_part(line, tmp_path/"deep"/"line", torch.float32)
    names = sorted(p.name for p in (tmp_path/"deep"/"line").iterdir())
    assert names == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path/"deep"/"line"/"model.safetensors")
    assert torch.equal(stored["slope.weight"], line.slope.weight)


def test_shared_weights_are_saved_and_read(tmp_path):
    class Tied(Line):
        def __init__(self, config):
            super().__init__(config)
            self.twin = self.slope

    tied = Tied(LineConfig())
    save_part(tied, tmp_path/"tied", torch.float32)
    found = load_model(Tied, LineConfig, tmp_path/"tied")
    assert torch.equal(found.twin.weight, tied.slope.weight)


@pytest.mark.parametrize("number", [7e4, float("inf"), float("nan")])
def test_numbers_that_do_not_survive_saving(tmp_path, number):
    line = Line(LineConfig())
    line.slope.bias.data[0] = number
    with pytest.raises(CheckpointError, match="slope.bias"):
        save_part(line, tmp_path/"line")
    assert not (tmp_path/"line").exists()


def test_strict_loading_names_a_few(tmp_path):
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)])
    with pytest.raises(CheckpointError, match="6 missing, such as 0.weight, 0.bias, 1.weight"):
        load_state_dict_strict(model, {}, "a.pt")


# ---- Fingerprints


def test_fingerprints_survive_saving_and_tell_tokenizers_apart(tmp_path):
    from t2i.tokenizers.multiscale import MultiScaleVQVAE, MultiScaleVQVAEConfig
    from t2i.tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
    from t2i.tokenizers.vqgan import VQGAN, VQGANConfig

    kinds = [(ViTVQGAN, ViTVQGANConfig, "shapes-vit-vqgan"), (VQGAN, VQGANConfig, "shapes-vqgan"),
             (MultiScaleVQVAE, MultiScaleVQVAEConfig, "shapes-msvq")]
    found = set()
    for number, (cls, config, name) in enumerate(kinds):
        tokenizer = load_model(cls, config, bundled_folder(name, only_bundled=True))
        for p in tokenizer.parameters():  # no longer representable in half precision
            p.data *= 1.0001
        for b in tokenizer.buffers():
            b *= 1.0001
        before = fingerprint(tokenizer)
        save_part(tokenizer, tmp_path/name)
        assert fingerprint(load_model(cls, config, tmp_path/name)) == before
        found.add(before)
    assert len(found) == len(kinds) and all(len(f) == 16 for f in found)


def test_fingerprints_see_codes_and_scales():
    def tokenizer(scales, code=0.):
        found = nn.Module()
        found.quantizer = nn.Embedding(4, 2, _weight=torch.zeros(4, 2))
        found.quantizer.weight.data[1, 1] = code
        found.scales = scales
        return found

    first = fingerprint(tokenizer((1, 2)))
    assert first == fingerprint(tokenizer([1, 2]))
    assert len({first, fingerprint(tokenizer((1, 3))), fingerprint(tokenizer((1, 2), 1.))}) == 3


# ---- Published files


class Server(HTTPServer):
    "Serves one answer, and counts how often it was asked"
    def __init__(self, content, promised=None, status=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.promised = promised
        self.status = status
        self.asked = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def file(self, **kw):
        "The registry's entry for what is served"
        return PublishedFile("x.ckpt", f"http://127.0.0.1:{self.server_port}/x.ckpt?dl=1", **kw)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.send_response(self.server.status)
        if self.server.promised is not None:
            self.send_header("Content-Length", str(self.server.promised))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args):
        "Keep quiet"


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty data folder"
    monkeypatch.setenv("T2I_HOME", str(tmp_path/"home"))
    return tmp_path/"home"/"checkpoints"


def content(kind="zip"):
    "The bytes of a weight file"
    buffer = io.BytesIO()
    torch.save(dict(WEIGHTS), buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def files(folder):
    "What lies in a folder beside locks, which stay"
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("kind", ["zip", "pickle"])
@pytest.mark.parametrize("promise", [True, False])
def test_a_whole_file_is_fetched_once(home, kind, promise):
    data = content(kind)
    with Server(data, len(data) if promise else None) as server:
        for _ in range(2):
            assert fetch(server.file()).read_bytes() == data
        assert server.asked == 1
    assert files(home) == ["x.ckpt"] and sorted(read_checkpoint(home/"x.ckpt")) == ["b", "w"]


def test_one_fetches_a_file_that_several_need(home, monkeypatch):
    download = checkpoints.download_file
    monkeypatch.setattr(checkpoints, "download_file", lambda *a: download(*a) or time.sleep(.2))
    with Server(content()) as server:
        waiting = [threading.Thread(target=fetch, args=[server.file()]) for _ in range(3)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        assert server.asked == 1
    assert files(home) == ["x.ckpt"]


def test_a_lock_that_was_waited_for_is_the_lock_of_those_who_come_later(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    lock = tmp_path/".x.lock"
    with one_at_a_time(tmp_path/"x"):
        waits = os.open(lock, os.O_RDWR)  # as a process does whose turn is next
    fcntl.flock(waits, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(Timeout):
        FileLock(lock).acquire(timeout=0)
    os.close(waits)
    with one_at_a_time(tmp_path/"x"):
        assert files(tmp_path) == []


@pytest.mark.parametrize("data, promised, says", [
    (b"PK\3\4" + bytes(99996), 5_000_000, "broke off after 100,000 of 5,000,000 bytes"),
    (content()[:-1], len(content()), "broke off"), (content()[:-9], None, "cut short"),
    (content("pickle")[:-9], len(content("pickle")), "broke off"), (b"", 0, "not a weight file"),
    (content().replace(b"\0\0\x40\x40", b"\0\0\x41\x40"), None, "damaged"),
    (b"<html>Please log in</html>", 26, "not a weight file"),
])  # fmt: skip
def test_a_file_that_is_not_whole_leaves_nothing(home, data, promised, says):
    with Server(data, promised) as server:
        for asked in (1, 2):
            with pytest.raises(CheckpointError, match=says) as e:
                fetch(server.file())
            assert server.asked == asked and files(home) == []
    assert str(home/"x.ckpt") in one_line(e) and ".tmp" not in one_line(e)


@pytest.mark.parametrize("broken", [b"PK\3\4" + bytes(500), content()[:-1], b"", b"<html></html>"])
def test_a_broken_file_of_an_earlier_version_is_fetched_again(home, broken):
    home.mkdir(parents=True)
    (home/"x.ckpt").write_bytes(broken)
    with Server(content()) as server:
        assert fetch(server.file()).read_bytes() == content()
    (home/"x.ckpt").write_bytes(broken)
    with pytest.raises(CheckpointError, match="cannot fetch"):
        fetch(server.file())  # the server is gone
    assert files(home) == []


def test_a_broken_file_that_was_put_by_hand_stays(home):
    home.mkdir(parents=True)
    manual = REGISTRY["vit-vqgan-small"]
    with pytest.raises(CheckpointError, match="by hand"):
        fetch(manual)
    (home/manual.file).write_bytes(content()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        fetch(manual)
    assert files(home) == [manual.file]
    (home/manual.file).write_bytes(content())
    assert fetch(manual) == home/manual.file


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_says_what_to_put_where(home, status):
    with Server(b"no", 2, status) as server:
        with pytest.raises(CheckpointError, match=f"{status}.*by hand") as e:
            fetch(server.file())
    assert str(home/"x.ckpt") in one_line(e)


def test_a_file_in_an_archive(home):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("model.ckpt", content())
    data = buffer.getvalue()
    with Server(data, len(data)) as server:
        with pytest.raises(CheckpointError, match="put other.ckpt at"):
            fetch(server.file(archive_member="other.ckpt"))
        assert fetch(server.file(archive_member="model.ckpt")).read_bytes() == content()
    assert files(home) == ["x.ckpt"]
    (home/"x.ckpt").unlink()
    with Server(data[:-5], len(data)) as server:
        with pytest.raises(CheckpointError, match="broke off"):
            fetch(server.file(archive_member="model.ckpt"))
    assert files(home) == []


def test_a_data_folder_that_cannot_be_made(home):
    home.parent.write_text("a file where the folder would be")
    with pytest.raises(CheckpointError, match="cannot fetch"):
        fetch(PublishedFile("x.ckpt", "file:///nowhere"))


def test_the_registry():
    assert len({p.file for p in REGISTRY.values()}) == len(REGISTRY)
    for name, published in REGISTRY.items():
        assert published.source.startswith("https://") and name == name.lower()
    assert REGISTRY["vgg16"].source.endswith(f"-{REGISTRY['vgg16'].sha256}.pth")
    assert detect_format(["features.0.weight", "classifier.0.weight"]) == "a VGG"
