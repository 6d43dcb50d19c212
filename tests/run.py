"`make test`: nbdev_test over all notebooks, then pytest; closes with one line of counts."
import os, re, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin_ = Path(sys.executable).parent
env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="agg", PATH=f"{bin_}{os.pathsep}{os.environ['PATH']}")


def run(*command):
    "Run, showing the output as it comes; returns exit code and output"
    p = subprocess.Popen([str(c) for c in command], cwd=root, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in p.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return p.wait(), "".join(lines)


notebooks = sorted((root/"nbs").glob("*.ipynb"))
code, out = run(bin_/"nbdev_test", "--n_workers", 2)
# nbdev_test exits 0 when it finds no notebook: only the word counts
failed = set(re.findall(r"^\s*(\w+\.ipynb)\s*$", out, re.M)) if code or "Success." not in out else set()
if "Success." not in out and not failed: failed = {n.name for n in notebooks}
code, out = run(sys.executable, "-m", "pytest", "-n", 2)
count = lambda word: sum(map(int, re.findall(rf"(\d+) {word}", out.splitlines()[-1]))) if out else 0
bad = len(failed) + count("failed") + count("error") + (code not in (0, 1))
print(f"{len(notebooks)-len(failed)+count('passed')} passed, {bad} failed, {count('skipped')} skipped")
sys.exit(bool(bad or code))
