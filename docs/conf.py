"""Sphinx, for `make docs`. It needs no network: there are no references into other projects' pages."""

from __future__ import annotations

import sys

from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import whitepool

project = "whitepool"
author = "the whitepool authors"
release = version = whitepool.__version__
exclude_patterns = ["_build"]

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "whitepool"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False

# The docstrings have the names of things in single backticks.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}

# What is named so is a parameter, an option, or another project's: there is no page to lead to.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"[a-z_]+|False|None|True|__cause__"),
    ("py:.*", r"(collections|contextlib|math|opentelemetry|psycopg|rich|trio|typing)\..*"),
    # Annotations, of names that are private, or that only a type checker knows.
    ("py:.*", r"(.*\.)?(C|K|R|S|T|P|RV|Row|Self|\w+Keywords|PoolState|PQGen|Strategy)"),
    ("py:.*", r"(.*\.)?AbstractAsyncContextManager"),
    (
        "py:class",
        r".*\b(AdaptContext|AsyncRowFactory|ConnParam|Configure|Factory|Hook|Reset|Unpack)\b.*",
    ),
    ("py:class", r"whitepool\.(postgres\.)?_\w+\.\w+"),
]

# Public things say that they are of `whitepool`, but the docstrings of their attributes can only be
# found in the source of the room in which they live.
_face = ModuleAnalyzer.for_module("whitepool")
_face.analyze()
for _name in [name for name in sys.modules if name.startswith("whitepool._")]:
    _room = ModuleAnalyzer.for_module(_name)
    _room.analyze()
    _face.attr_docs.update(_room.attr_docs)
    _face.tagorder.update(_room.tagorder)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_google_style)


def read_google_style(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Do what the extension napoleon does, but not to attributes: there it takes what stands before a
    colon for a type."""
    if what != "attribute":
        lines[:] = GoogleDocstring(lines).lines()
