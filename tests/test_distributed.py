"The others wait for the main process for longer than their group would."
import multiprocessing
import time
from datetime import timedelta

import torch.distributed as dist

from t2i.engine.distributed import main_process_first


def work(rank, meet, results, patient):
    group = dict(rank=rank, world_size=2, timeout=timedelta(seconds=1))
    dist.init_process_group("gloo", f"file://{meet}", **group)
    try:
        if patient:
            with main_process_first():
                time.sleep(3*(rank == 0))
        else:
            time.sleep(3*(rank == 0))
            dist.barrier()
        results.put("waited")
    except RuntimeError:
        results.put("gave up")


def wait_for_main(meet, patient):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=work, args=(r, meet, results, patient)) for r in range(2)]
    for process in processes:
        process.start()
    found = {results.get() for _ in processes}
    for process in processes:
        process.join()
    return found


def test_a_cache_may_take_longer_to_fill_than_a_group_waits(tmp_path):
    assert wait_for_main(tmp_path/"patient", True) == {"waited"}
    assert "gave up" in wait_for_main(tmp_path/"plain", False)
