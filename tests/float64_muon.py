"""Trainings one after the other, with Muon's iteration in float64 (`torch.optim.Muon` iterates in
bfloat16): the argument is a JSON file, a list of [recipe, run folder, overrides]."""
import json
import sys
from pathlib import Path

from torch.optim import _muon

from t2i.training import train

in_bfloat16 = _muon._zeropower_via_newtonschulz


class Exact:
    "A gradient that stays in float64 where the iteration asks for bfloat16"
    def __init__(self, grad):
        self.grad = grad
        self.shape = grad.shape

    def size(self, i):
        return self.grad.size(i)

    def bfloat16(self):
        return self.grad.double()  # a copy, which the iteration changes in place


def in_float64(grad, *settings):
    return in_bfloat16(Exact(grad), *settings).to(grad.dtype)


_muon._zeropower_via_newtonschulz = in_float64

if __name__ == "__main__":
    for recipe, run, overrides in json.loads(Path(sys.argv[1]).read_text()):
        train(recipe, run, tuple(overrides))
