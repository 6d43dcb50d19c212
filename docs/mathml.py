"Equations as MathML, which browsers draw themselves: the site needs no script and no fonts for it."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def visit_math(translator, node):
    "An equation inside a line"
    translator.body.append(convert(node.astext(), display="inline"))
    raise SkipNode


def visit_display(translator, node):
    "An equation on its own"
    equation = convert(node.astext(), display="block")
    translator.body.append(f'<div class="math">{equation}</div>\n')
    raise SkipNode


def setup(app):
    "What Sphinx calls"
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_display, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
