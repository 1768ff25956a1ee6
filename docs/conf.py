"""Configuration of the documentation site, which `make docs` builds with Sphinx."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from generate import write_pages

project = "launch"
author = "the authors of launch"
version = release = metadata.version("launch")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
html_theme = "furo"
html_title = f"launch {release}"
html_copy_source = False


def setup(app: Any) -> None:
    """Write the generated pages before Sphinx reads the others, which include them."""
    app.connect("autodoc-process-docstring", escape_stars)
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "_generated"))


def escape_stars(*event: Any) -> None:
    """Escape the stars of a docstring outside of code spans: `**kwargs` is no bold text."""
    lines: list[str] = event[-1]
    lines[:] = [re.sub(r"(`[^`]*`)|\*", lambda found: found[1] or r"\*", line) for line in lines]
