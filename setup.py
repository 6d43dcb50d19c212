"Packaging: everything that can change stands in settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
readme = here/"README.md"
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
c = config["DEFAULT"]

setuptools.setup(
    name=c["lib_name"], version=c["version"], description=c["description"], license="MIT",
    author=c["author"], author_email=c["author_email"], url=c["git_url"], keywords=c["keywords"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=setuptools.find_packages(include=["t2i", "t2i.*"]), include_package_data=True,
    package_data={"t2i": ["data/*.tsv", "recipes/*.yaml", "pretrained/*/*", "pretrained/*/*/*"]},
    python_requires=">="+c["min_python"], install_requires=c["requirements"].split(),
    extras_require={k: c[f"{k}_requirements"].split() for k in ("lessons", "train", "app", "dev")},
    entry_points={
        "console_scripts": c["console_scripts"].split(),
        "nbdev": [f"{c['lib_name']}={c['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
