"""The documentation: `make docs` builds it into docs/_build, offline, warnings fail."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import hyperjax  # noqa: E402

project = "hyperjax"
author = copyright = "The hyperjax authors"
version = release = hyperjax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]
exclude_patterns = ["_build"]
suppress_warnings = ["myst-nb.lexer"]  # of cells that a test leaves out

html_theme = "furo"
html_title = "hyperjax"
html_static_path = ["_static"]
html_css_files = ["hyperjax.css"]
html_show_sphinx = False
html_copy_source = False

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4

# Notebooks run from nothing at each build, in a folder that is gone afterwards. An
# error in a cell is a warning that shows it, and fails the build as all warnings do.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_execution_timeout = 1200  # seconds a cell, on a busy machine
nb_merge_streams = True
nb_render_markdown_format = "myst"
# What programs of notebooks are started with: this Python, its commands, programs that
# compile quickly, kept for the next build.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ["PYTHONPATH"] = str(HERE.parent)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Docstrings have names in single quotes: links where there is such a thing, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
