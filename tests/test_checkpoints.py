"Files from elsewhere: nothing in them runs, and what they claim is checked."
import io, os, pickle, zipfile
from collections import OrderedDict

import pytest, torch

from t2i import T2IError
from t2i.engine.checkpoints import Stub, TensorUnpickler, read_checkpoint

WEIGHTS = OrderedDict(w=torch.arange(6.).reshape(2, 3), b=torch.ones(2, dtype=torch.float16))


class Call:
    "Pickles as a call of a function"
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


class Callback:
    "An object of the training program, with state of its own"
    def __init__(self): self.best, self.folder = {"epoch=1": torch.ones(3)}, os.getcwd()


def payloads(marker):
    shell = Call(os.system, f"touch {marker}")
    return dict(shell=shell, evaluated=Call(eval, f"open({str(marker)!r}, 'w')"), executed=Call(exec, f"open({str(marker)!r}, 'w')"), opened=Call(open, str(marker), "w"),
                imported=Call(__import__, "antigravity"), nested=[{"a": (Call(getattr, Call(__import__, "os"), "system"), shell)}],
                callback=Callback(), reader=Call(pickle.loads, pickle.dumps(shell)), unbound=Call(io.open, str(marker), "w"))


@pytest.mark.parametrize("name", list(payloads("x")))
def test_payloads_do_nothing(tmp_path, name):
    marker = tmp_path/"marker"
    torch.save(dict(state_dict=WEIGHTS, hyper_parameters=payloads(marker)[name], epoch=3), tmp_path/"last.ckpt")
    found = read_checkpoint(tmp_path/"last.ckpt")
    assert not marker.exists()
    assert list(found) == ["w", "b"] and all(torch.equal(found[k], WEIGHTS[k]) for k in found)


def test_a_payload_among_the_weights(tmp_path):
    torch.save(dict(state_dict=WEIGHTS | {"evil": Call(os.system, f"touch {tmp_path/'marker'}")}), tmp_path/"last.ckpt")
    assert list(read_checkpoint(tmp_path/"last.ckpt")) == ["w", "b"]
    assert not (tmp_path/"marker").exists()


def rewritten(path, change):
    "The same archive with its entries changed"
    entries = {n: zipfile.ZipFile(path).read(n) for n in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        for n, data in entries.items(): z.writestr(n, change(n, data))


def claiming(numbers, size_too):
    "data.pkl of a one-tensor file in which 6 numbers have become many"
    big = b"\x8a\x05"+numbers.to_bytes(5, "little")
    def change(name, data):
        if not name.endswith("data.pkl"): return data
        data = data.replace(b"K\x06t", big+b"t")            # the storage
        return data.replace(b"K\x06\x85", big+b"\x85") if size_too else data
    return change


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("change", [claiming(2_500_000_000, False), claiming(2_500_000_000, True)])
def test_ten_gigabytes_that_are_not_there(tmp_path, change, hidden):
    path = tmp_path/"last.ckpt"
    torch.save(dict(state_dict=dict(w=torch.arange(6.)), other=Callback() if hidden else 0), path)
    rewritten(path, change)
    with pytest.raises(T2IError) as e: read_checkpoint(path)
    assert "\n" not in str(e.value)


def test_a_view_beyond_its_storage(tmp_path):
    path = tmp_path/"last.ckpt"
    torch.save(dict(state_dict=dict(w=torch.arange(6.)), other=Callback()), path)
    rewritten(path, lambda n, d: d.replace(b"K\x06\x85", b"K\x07\x85") if n.endswith("data.pkl") else d)
    with pytest.raises(T2IError, match="cannot read"): read_checkpoint(path)


def test_a_compressed_storage(tmp_path):
    path = tmp_path/"last.ckpt"
    torch.save(dict(w=torch.zeros(100_000), other=Callback()), path)
    entries = {n: zipfile.ZipFile(path).read(n) for n in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for n, data in entries.items(): z.writestr(n, data)
    with pytest.raises(T2IError): read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint", pickle.dumps(dict(w=[1, 2])), b"\x80\x02cos\nsystem\n(S'echo'\ntR."])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path/"x.ckpt").write_bytes(content)
    with pytest.raises(T2IError, match="x.ckpt") as e: read_checkpoint(tmp_path/"x.ckpt")
    assert "\n" not in str(e.value)


def test_a_script_archive_is_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path/"x.pt")
    with pytest.raises(T2IError, match="x.pt"): read_checkpoint(tmp_path/"x.pt")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"trainer": {"var_wo_ddp": w, "epoch": 1}}, lambda w: {"model": {"state_dict": w}}])
@pytest.mark.parametrize("hidden", [False, True])
def test_wrappings(tmp_path, wrap, hidden):
    torch.save(wrap(WEIGHTS | ({"odd": Callback()} if hidden else {})), tmp_path/"x.pth")
    found = read_checkpoint(tmp_path/"x.pth")
    assert list(found) == ["w", "b"] and found["b"].dtype == torch.float16


def test_shared_strided_and_empty_tensors(tmp_path):
    base = torch.arange(12.).reshape(3, 4)
    tensors = dict(base=base, row=base[1], turned=base.T, parameter=torch.nn.Parameter(base), empty=torch.empty(0, 3), yes=torch.tensor(True), number=torch.tensor(3))
    torch.save(tensors | {"odd": Callback()}, tmp_path/"x.pth")
    with zipfile.ZipFile(tmp_path/"x.pth") as z: found = TensorUnpickler(z).load()
    assert isinstance(found.pop("odd"), Stub)
    for k, t in tensors.items(): assert torch.equal(found[k], t.data) and found[k].shape == t.shape, k
    assert found["row"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()
