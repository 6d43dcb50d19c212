"`make test`: nbdev_test over all notebooks, then pytest; closes with one line of counts."
import os
import re
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
programs = Path(sys.executable).parent
env = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
}


def run(*command):
    "Run, showing the output as it comes; returns exit code and output"
    command = [str(word) for word in command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=root, env=env, text=True, **streams)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def failed_notebooks(notebooks, code, output):
    "Names of the notebooks that failed"
    # nbdev_test exits 0 when it finds no notebook, so only its last word counts
    if "Success." not in output:
        named = set(re.findall(r"^\s*(\w+\.ipynb)\s*$", output, re.M))
        return named or {path.name for path in notebooks}
    return {path.name for path in notebooks} if code else set()


def count(word, output):
    "The number before `word` in the last line of pytest's output"
    last = output.splitlines()[-1] if output else ""
    return sum(int(number) for number in re.findall(rf"(\d+) {word}", last))


def main():
    notebooks = sorted((root/"nbs").glob("*.ipynb"))
    failed = failed_notebooks(notebooks, *run(programs/"nbdev_test", "--n_workers", 2))
    code, output = run(sys.executable, "-m", "pytest", "-n", 2)
    bad = len(failed) + count("failed", output) + count("error", output) + (code not in (0, 1))
    passed = len(notebooks) - len(failed) + count("passed", output)
    print(f"{passed} passed, {bad} failed, {count('skipped', output)} skipped")
    sys.exit(bool(bad or code))


if __name__ == "__main__":
    main()
