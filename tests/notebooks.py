"A notebook's cells, run in a process of a pool. Not in `__main__`, whose names notebooks replace."
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def passes(path):
    "Runs a notebook's cells as nbdev_test does; is all well?"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    return test_nb(path, get_config().tst_flags.split(), basepath=root)[0]
