"Files that are whole or not there: permissions, links, long names, kills; where data lies."
import json
import os
import signal
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i import T2IError
from t2i.engine.files import (
    atomic_path,
    bundled_folder,
    check_video,
    config_from_dict,
    data_home,
    hash_of,
    save_png,
    save_video,
)


def mode(path):
    "A file's permission bits"
    return stat.S_IMODE(path.stat().st_mode)


def write(path, text="new", permissions=None):
    "Write a text through `atomic_path`"
    with atomic_path(path) as p:
        p.write_text(text)
        if permissions is not None:
            p.chmod(permissions)


@pytest.fixture
def umask():
    "The umask as it was before the test, restored after it"
    before = os.umask(0o022)
    os.umask(before)
    yield before
    os.umask(before)


# ---- Permissions


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_of_new_files(tmp_path, umask, mask):
    os.umask(mask)
    write(tmp_path/"a", permissions=0o600)
    with atomic_path(tmp_path/"folder") as p:
        (p/"deep").mkdir(parents=True)
        (p/"deep"/"b").touch(mode=0o600)
    assert mode(tmp_path/"a") == mode(tmp_path/"folder"/"deep"/"b") == 0o666 & ~mask
    assert os.umask(mask) == mask


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, before):
    (tmp_path/"a").touch()
    (tmp_path/"a").chmod(before)
    write(tmp_path/"a")
    assert mode(tmp_path/"a") == before and (tmp_path/"a").read_text() == "new"


def test_the_umask_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is changed"))
    write(tmp_path/"a")
    save_png(Image.new("RGB", (2, 2)), tmp_path/"b.png")


def test_what_a_link_in_a_folder_points_to_is_left_alone(tmp_path):
    (tmp_path/"private").touch()
    (tmp_path/"private").chmod(0o600)
    with atomic_path(tmp_path/"folder") as p:
        p.mkdir()
        (p/"link").symlink_to(tmp_path/"private")
        (p/"dangling").symlink_to("nowhere")
    assert mode(tmp_path/"private") == 0o600
    assert (tmp_path/"folder"/"dangling").is_symlink()


# ---- Links and devices


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    real = tmp_path/"elsewhere"/"real.txt"
    if there:
        real.parent.mkdir()
        real.write_text("old")
    (tmp_path/"one").symlink_to(real)
    (tmp_path/"two").symlink_to("one")  # relative, and a link to a link
    write(tmp_path/"two")
    assert (tmp_path/"one").is_symlink() and (tmp_path/"two").is_symlink()
    assert real.read_text() == "new"
    assert [p.name for p in real.parent.iterdir()] == ["real.txt"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path/"real").mkdir()
    (tmp_path/"real"/"old").touch()
    (tmp_path/"link").symlink_to(tmp_path/"real")
    with atomic_path(tmp_path/"link") as p:
        p.mkdir()
        (p/"new").touch()
    assert (tmp_path/"link").is_symlink()
    assert [p.name for p in (tmp_path/"real").iterdir()] == ["new"]


def test_a_link_to_itself_is_an_error(tmp_path):
    (tmp_path/"ring").symlink_to(tmp_path/"ring")
    with pytest.raises((OSError, RuntimeError)):
        write(tmp_path/"ring")
    assert (tmp_path/"ring").is_symlink()


def test_devices_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    for path in (tmp_path/"pipe", Path("/dev/null")):
        with pytest.raises(ValueError, match="neither a file nor a folder"):
            write(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- Names


@pytest.mark.parametrize("name", [
    "x"*255, "x"*251 + ".png", "ü"*127, "图"*84 + ".x", "a b.c", ".hidden", "-n", "'\n",
    "\udcff.png",
])  # fmt: skip
def test_every_name_that_the_file_system_takes(tmp_path, name):
    try:
        (tmp_path/name).touch()
    except OSError:
        pytest.skip("this file system does not take the name")
    (tmp_path/name).unlink()
    write(tmp_path/name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path/name).read_text() == "new"


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path/"a").mkdir()
    (tmp_path/"a"/"mine").touch()
    with pytest.raises(OSError):
        write(tmp_path/"a")
    assert (tmp_path/"a"/"mine").is_file()


def test_an_error_names_the_target(tmp_path):
    with pytest.raises(OSError) as e:
        with atomic_path(tmp_path/"a") as p:
            open(p/"b", "w")
    assert e.value.filename == str(tmp_path/"a"/"b")


# ---- Ends of all kinds


def test_an_interruption_leaves_the_old_file(tmp_path):
    write(tmp_path/"a", "old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/"a") as p:
            p.write_text("ne")
            raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path/"a").read_text() == "old"


def test_a_kill_leaves_the_old_file(tmp_path):
    write(tmp_path/"a", "old")
    child = os.fork()
    if not child:
        with atomic_path(tmp_path/"a") as p:
            p.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path/"a").read_text() == "old"
    (torn,) = [p for p in tmp_path.iterdir() if p.name != "a"]
    assert torn.match(".*.tmp")  # as `init_run_dir` looks for it
    write(tmp_path/"a")
    assert (tmp_path/"a").read_text() == "new"


def test_two_threads_write_one_file(tmp_path):
    texts = ["a"*100_000, "b"*100_000]

    def many(text):
        for _ in range(20):
            write(tmp_path/"a", text)

    threads = [threading.Thread(target=many, args=[t]) for t in texts]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (tmp_path/"a").read_text() in texts and len(list(tmp_path.iterdir())) == 1


# ---- PNG and video


def test_text_that_is_not_unicode_is_saved(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path/"a.png", prompt="a red \udcff circle", path="p")
    assert Image.open(tmp_path/"a.png").text == dict(prompt="a red ? circle", path="p")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ".MP4"])
def test_videos(tmp_path, suffix):
    iio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    frames = [Image.new("RGB", (65, 64), c) for c in ("red", "green", "blue")]
    save_video(frames, tmp_path/f"v{suffix}", fps=5)
    found = np.stack(list(iio.imiter(tmp_path/f"v{suffix}")))[..., :3].astype(int)
    assert found.shape[:3] == (3, 256, 260)
    assert found.reshape(3, -1, 3).mean(1).argmax(1).tolist() == [0, 1, 2]


def test_videos_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(T2IError, match="ends in .mp4, .gif, .webp"):
        check_video("a.avi")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr("t2i.engine.files.find_spec", lambda name: None)
    with pytest.raises(T2IError, match="pip install"):
        check_video("a.mp4")
    frames = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    with pytest.raises(ValueError, match="2 sizes"):
        save_video(frames, tmp_path/"a.gif")
    assert not list(tmp_path.iterdir())


# ---- Where things lie


def test_no_home_folder_names_the_variable(monkeypatch):
    monkeypatch.delenv("T2I_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("t2i.engine.files.files", lambda name: Path("/nowhere/t2i"))

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(T2IError, match="T2I_HOME"):
        data_home()


def test_a_user_without_a_home_folder():
    "A user id that no list of users has, and no HOME"
    child = os.fork()
    if not child:
        for name in ("HOME", "T2I_HOME", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        import t2i.engine.files as files
        files.files = lambda name: Path("/nowhere/t2i")
        status = 2
        try:
            if os.getuid() == 0:
                os.setuid(54321)
            elif Path("~").expanduser() != Path("~"):
                os._exit(3)
            data_home()
        except T2IError as e:
            status = int("T2I_HOME" not in str(e))
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 3:
        pytest.skip("only root can become a user without a home folder")
    assert status == 0


def test_a_bundled_name_means_the_bundled_model_where_asked(tmp_path, monkeypatch):
    ours = bundled_folder("shapes-msvq")
    monkeypatch.chdir(tmp_path)
    (tmp_path/"shapes-msvq").mkdir()
    (tmp_path/"mine").mkdir()
    assert bundled_folder("shapes-msvq") == Path("shapes-msvq")
    assert bundled_folder("shapes-msvq", only_bundled=True) == ours
    assert bundled_folder("shapes-var/generator", only_bundled=True).parent.name == "shapes-var"
    for name in ("mine", tmp_path/"mine", "", ".", "..", "shapes-var/../../pretrained", "x\0"):
        with pytest.raises(T2IError, match="no bundled model"):
            bundled_folder(name, only_bundled=True)
    for name in ("", "no-such-model", "a/b/c", "x"*300):
        with pytest.raises(T2IError, match="no model"):
            bundled_folder(name)


@dataclass
class Size:
    h:int
    w:int=4

    def __post_init__(self):
        if self.h < 1:
            raise T2IError("h must be positive")


@pytest.mark.parametrize("values, says", [
    (dict(h=8, colour=3), "c.json: unknown field 'colour'; known are h, w"),
    ({1: 2}, "unknown field 1"), ([], "not a list"), (None, "not a NoneType"), ({}, "'h'"),
    (dict(h="big"), "c.json: .*str"), (dict(h=0), "h must be positive"),
])  # fmt: skip
def test_configs_are_read_strictly(values, says):
    with pytest.raises(T2IError, match=says) as e:
        config_from_dict(Size, values, "c.json")
    assert "\n" not in str(e.value)


# ---- Hashes


def test_hashes_differ_where_anything_differs():
    a = torch.zeros(5000)
    b = a.clone()
    b[2500] = 1e-6
    values = [
        a, b, [a], [b], dict(x=a), dict(x=b), dict(y=a), a.half(), a.double(), a.view(50, 100),
        a.numpy(), b.numpy(), a.numpy().reshape(50, 100), (a, a), torch.cat([a, a]),
        1, "1", 1.0, True, None, "", [], [[]], ["a", "b"], ["ab"], b"1", torch.tensor(1), {1},
        "\ud800",
    ]  # fmt: skip
    names = [hash_of(v) for v in values]
    assert len(set(names)) == len(values)
    assert hash_of("ab") != hash_of("a", "b") and hash_of(1, 23) != hash_of(12, 3)


def test_hashes_are_equal_where_nothing_differs():
    a = torch.arange(6.).view(2, 3)
    assert hash_of(a) == hash_of(a.clone()) == hash_of(a.T.contiguous().T)
    assert hash_of(torch.nn.Parameter(a)) == hash_of(a)
    assert hash_of(dict(a=1, b=[2, 3])) == hash_of(dict(b=(2, 3), a=1))
    assert hash_of(np.float64(.5), np.int64(3)) == hash_of(.5, 3)
    assert hash_of(json.loads('{"x": [1, null]}')) == hash_of(dict(x=(1, None)))


@pytest.mark.parametrize("value", [object(), str.upper.__call__, [object()], dict(f=lambda: 0)])
def test_what_has_no_lasting_name_is_refused(value):
    with pytest.raises(TypeError, match="cannot be hashed"):
        hash_of(value)
