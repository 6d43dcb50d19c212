"""Processes that have their imports done.

A fresh Python takes seconds of a core to import torch, lightning and open_clip, and the tests start
dozens. So a server imports them once (`warm.py`), and each process is forked from it. `torchrun`
itself, and the launcher of lightning, are tested in tests/test_runs.py.
"""
import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import sys
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

root = Path(__file__).resolve().parent.parent
servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["warm"])
ENVIRONMENT = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@dataclass
class Finished:
    "How a process ended, and what it printed"
    returncode:int
    stdout:str
    stderr:str


def work(words, environment, folder, stdout, stderr):
    "In the new process: what `python WORDS` does"
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        if path:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
    faulthandler.enable()  # a crash of compiled code says where
    torch.set_num_threads(1)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], dict(__name__="__main__"))
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


@contextlib.contextmanager
def environment_of_servers():
    "Inside, a new Python finds `warm.py`; killed processes leave a lock, which needs no warning"
    usual = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root/"tests"), *sys.path])
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    try:
        yield
    finally:
        for name in ("PYTHONPATH", "PYTHONWARNINGS"):
            del os.environ[name]
        os.environ.update(usual)


def start(*words, folder=None, stdout=None, stderr=None, **environment):
    "Start `python WORDS` without its imports; a `multiprocessing.Process`"
    with environment_of_servers():
        forkserver.ensure_running()
    given = os.environ | ENVIRONMENT | environment
    arguments = [str(word) for word in words], dict(given), str(folder or os.getcwd())
    process = servers.Process(target=work, args=(*arguments, stdout, stderr))
    process.start()
    return process


def run(*words, **options):
    "`python WORDS` to its end"
    with TemporaryDirectory() as files:
        paths = [Path(files)/name for name in ("stdout", "stderr")]
        for path in paths:
            path.touch()
        process = start(*words, stdout=paths[0], stderr=paths[1], **options)
        process.join()
        return Finished(process.exitcode, *[path.read_text() for path in paths])


def wait_for(line, process, log, seconds=900):
    "Until a process has logged a line; one that ends before, or hangs, is an error with its log"
    end = time.monotonic() + seconds
    while line not in log.read_text():
        assert process.is_alive() and time.monotonic() < end, log.read_text()
        time.sleep(.1)


def meeting(count):
    "A store at which so many processes meet, and the environment that torchrun gives to all"
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, dict(
        WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), GROUP_RANK="0",
        MASTER_ADDR="localhost", MASTER_PORT=str(store.port), TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True")  # the store is there: no process opens a port


@contextlib.contextmanager
def ranks(count, *words, **options):
    "Inside, so many processes are at work as torchrun starts them; at the end, none is left"
    store, shared = meeting(count)
    processes = []
    try:
        for rank in range(count):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
            processes.append(start(*words, **shared, **own, **options))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()
        del store


def torchrun(count, *words, **options):
    "`torchrun --nproc-per-node=COUNT WORDS`: an error if one of the processes fails"
    with TemporaryDirectory() as files:
        log = Path(options.setdefault("stderr", Path(files)/"stderr"))
        log.touch()
        with ranks(count, *words, **options) as waiting:
            while waiting:
                ended = connection.wait([process.sentinel for process in waiting])
                codes = [process.exitcode for process in waiting if process.sentinel in ended]
                assert not any(codes), f"{words} failed:\n{log.read_text()[-3000:]}"
                waiting = [process for process in waiting if process.sentinel not in ended]
