"Configuration of the site; build_site.py writes the pages that Sphinx reads."
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here))

settings = ConfigParser(delimiters=["="])
settings.read(here.parent/"settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
project_copyright = settings["copyright"]
version = release = settings["version"]

extensions = ["myst_nb", "mathml"]
html_math_renderer = "mathml"

# Notebooks: the stored outputs are shown, nothing runs.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_text_lexer = "none"
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
myst_update_mathjax = False

# The API's pages
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 72
add_module_names = False

html_theme = "furo"
html_title = "t2i"
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_static_path = [str(here/"static")]
html_css_files = ["t2i.css"]
html_copy_source = False
html_show_sphinx = False
html_favicon = str(here/"static"/"icon.svg")
html_theme_options = dict(
    source_repository=settings["git_url"],
    source_branch=settings["branch"],
    top_of_page_buttons=[],
    footer_icons=[],
)
pygments_style = "friendly"
pygments_dark_style = "monokai"
