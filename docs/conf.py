"""Sphinx, for `make docs`. It needs no network: other projects' pages are in inventories."""

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

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"whitepool {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False

# The docstrings have the names of things in single backticks.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}

# `make inventories` writes these; docs/inventories.py says what is in them.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "trio": ("https://trio.readthedocs.io/en/stable", "inventories/trio.inv"),
    "psycopg": ("https://www.psycopg.org/psycopg3/docs", "inventories/psycopg.inv"),
}

# Addresses in examples.
linkcheck_ignore = [r"https?://(127\.0\.0\.1|localhost|example\.)"]

# What is named so is a parameter, an option, or another project's: there is no page to lead to.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r"[a-z_]+|False|None|True|__cause__"),
    ("py:.*", r"(opentelemetry|rich)\..*"),
    ("py:obj", r"psycopg\.errors\.\w+SqlTransaction"),  # in a table there, without an address
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
    app.connect("viewcode-follow-imported", room_of)


def read_google_style(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Do what the extension napoleon does, but not to attributes: there it takes what stands before a
    colon for a type."""
    if what != "attribute":
        lines[:] = GoogleDocstring(lines).lines()


def room_of(app: Sphinx, module: str, name: str) -> str | None:
    """Return the module that has the source of a public thing, or of an attribute of it."""
    public = name.partition(".")[0]
    for room in [room for room in sys.modules if room.startswith(f"{module}._")]:
        if public in ModuleAnalyzer.for_module(room).find_tags():
            return room
    return None
