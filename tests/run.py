"`make test`: the code of all notebooks, then pytest; closes with one line of counts."
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from notebooks import passes

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


# The notebooks that take the longest begin first, so that both workers end at about the same time.
LONG = (
    "03_mixtures", "33_masked_var", "37_clip_var", "start", "34_super_resolution", "42_lora",
    "30_parti", "41_new_class", "43_boxes_training", "52_benchmarks", "39_parti_training",
    "21_vqgan_clip", "15_tokenizer_training", "index", "41_adapter", "53_cli", "32_text_var",
    "60_emoji", "35_reading", "39_text_pretraining", "31_var", "11_vqgan", "58_cli_models",
    "36_text_training", "60_words_and_places", "09_emoji", "40_captioning", "22_dream",
    "09_emoji_judge", "41_without_captions",
)


def failed_notebooks(notebooks):
    "Names of the notebooks that failed"
    ordered = sorted(notebooks, key=lambda p: LONG.index(p.stem) if p.stem in LONG else len(LONG))
    failed = set()
    with ProcessPoolExecutor(2) as pool:
        waiting = {pool.submit(passes, path): path for path in ordered}
        for done in as_completed(waiting):
            if done.exception() or not done.result():
                failed.add(waiting[done].name)
                print(f"{waiting[done].name} failed", done.exception() or "", flush=True)
    return failed


def count(word, output):
    "The number before `word` in the line that closes pytest's output"
    closing = re.findall(r"^.*\d+ \w+.* in [\d.]+s.*$", output, re.M)[-1:]
    return sum(int(number) for number in re.findall(rf"(\d+) {word}", *closing or [""]))


def main():
    notebooks = sorted((root/"nbs").glob("*.ipynb"))
    os.chdir(root)
    os.environ.update(env)
    failed = failed_notebooks(notebooks)
    code, output = run(sys.executable, "-m", "pytest", "-n", 2, "--dist", "worksteal")
    bad = len(failed) + count("failed", output) + count("error", output) + (code not in (0, 1))
    passed = len(notebooks) - len(failed) + count("passed", output)
    print(f"{passed} passed, {bad} failed, {count('skipped', output)} skipped")
    sys.exit(bool(bad or code))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    main()
