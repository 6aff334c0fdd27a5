"""Sphinx configuration: Markdown by MyST, reference from docstrings, tables from the registry."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from honeloom import __version__

project = "honeloom"
author = "the honeloom authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "honeloom_docs"]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
default_role = "literal"  # docstrings write names in single backticks

html_theme = "furo"
html_title = f"honeloom {release}"
html_show_sphinx = False
html_show_copyright = False
