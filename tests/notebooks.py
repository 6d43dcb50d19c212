"A notebook's cells, run in a process of a pool. Not in `__main__`, whose names notebooks replace."
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def draw_small():
    "Figures are drawn once and with few pixels: nobody looks at them here, and large ones are slow"
    from matplotlib_inline.config import InlineBackend
    InlineBackend.instance().print_figure_kwargs = dict(bbox_inches=None, dpi=20)


def passes(path):
    "Runs a notebook's cells as nbdev_test does; is all well?"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    draw_small()
    return test_nb(path, get_config().tst_flags.split(), basepath=root)[0]
