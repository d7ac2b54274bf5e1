"""Sphinx builds the site: `sphinx-build -W --keep-going docs docs/_build`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The documented package is the one next to this folder, also in the notebooks' own processes.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# tqdm says in notebooks that it would like to draw its bars with another package.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

from griffin_jax import __version__  # noqa: E402

project = "griffin_jax"
author = "the authors of griffin_jax"
copyright = f"{author}, Apache-2.0"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]

# Fences without a language are shell commands.
highlight_language = "none"

html_theme = "furo"
html_title = f"griffin_jax {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# A notebook is executed anew if its text has changed; remove docs/_build after a change of the code that it shows.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / ".jupyter_cache")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# Docstrings are written for people at a prompt: `name` in them is code.
default_role = "code"

SECTION = re.compile(r"\s*(Args|Attributes|Raises|Returns|Yields):$")


def show_examples_as_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Mark the indented examples of a docstring as code, which reStructuredText would take for quotations."""
    marked: list[str] = []
    before = ""
    for number, line in enumerate(lines):
        starts = line.strip() and number and not lines[number - 1].strip() and before.strip()
        if starts and indent(line) > indent(before) and not SECTION.match(before):
            marked += [f"{' ' * indent(before)}.. code-block:: python", ""]
        marked.append(line)
        # An example goes on over its own blank lines.
        if line.strip() and not (starts and indent(line) > indent(before)):
            before = line if not before or indent(line) <= indent(before) or not starts else before
    lines[:] = marked


def escape_types(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """The asterisk of a shape such as "*b" is no emphasis."""
    lines[:] = [line.replace("*", r"\*") if line.lstrip().startswith(":vartype") else line for line in lines]


def indent(line: str) -> int:
    """Spaces that a line begins with."""
    return len(line) - len(line.lstrip())


def setup(app: Any) -> None:
    """Connect what is done to docstrings, before napoleon reads their sections and after it."""
    app.connect("autodoc-process-docstring", show_examples_as_code, priority=100)
    app.connect("autodoc-process-docstring", escape_types, priority=900)
