"The Chromium in which tests open pages"
import shutil
from importlib.util import find_spec
from pathlib import Path

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def find_chromium(): # a path; None: there is no Chromium, or no playwright
    "A Chromium of this machine, or the one that playwright has fetched"
    if find_spec("playwright") is None:
        return None
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found:
        return found
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        fetched = p.chromium.executable_path
    return fetched if Path(fetched).is_file() else None
