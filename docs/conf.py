"""Sphinx's configuration of the site that ``tools/docs`` builds."""

from miniloader import __version__

project = "miniloader"
author = "the miniloader authors"
copyright = author
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"miniloader {release}"
html_show_sourcelink = False
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
exclude_patterns = ["examples"]
suppress_warnings = ["misc.highlighting_failure"]  # listings whose comments are more than Python
