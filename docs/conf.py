"""How the documentation is built: sphinx-build -W --keep-going -b html docs docs/_build/html."""

from factordisc import __version__

project = "factordisc"
author = "The factordisc developers"
copyright = "2026, The factordisc developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Docstrings put names into single backticks: they link where there is something to link to.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"factordisc {release}"
