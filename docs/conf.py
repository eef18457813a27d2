"""How Sphinx builds the site: `make docs`.

The lessons are executed, the tables come from committed records, and no page asks the network for anything.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import tinymoe  # noqa: E402

project = "tinymoe"
author = "The tinymoe developers"
version = release = tinymoe.__version__
copyright = "the tinymoe developers, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",  # for the directive; sybil runs the examples, under `make test`
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
    "sphinx_design",
    "sphinx_copybutton",
    "extension.explorer",
    "extension.lessons",
    "extension.names",
    "extension.records",
]
exclude_patterns = ["_build", "_mathjax", "lessons/README.rst", "lessons/GALLERY_HEADER.rst"]
nitpicky = True
# A word in `single backquotes` of a docstring is the name of an object of ours.
default_role = "py:obj"
nitpick_ignore_regex = [
    # An attribute that stands in its class's docstring has no place of its own.
    (r"py:obj", r"Mixtral\.params"),
    # What other projects document: their inventories are on the network, and the build asks it for nothing.
    (r"py:.*", r"(numpy|np|collections|pathlib|types|typing|contextlib|ml_dtypes|matplotlib)\..*"),
    (r"py:.*", r"(Path|Any|Callable|Iterable|Iterator|Sequence|Mapping|NamedTuple|ContextManager)"),
]

# ---- Markdown

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# ---- API

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections say the types where they matter
numpydoc_show_class_members = False

# ---- Lessons

sphinx_gallery_conf = {
    "examples_dirs": "../lessons",
    "gallery_dirs": "lessons",
    "filename_pattern": r"/lesson_",
    "ignore_pattern": r"/(?!lesson_)[^/]*\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": False,  # all that fail are named; -W then fails the build
    "write_computation_times": False,
    "min_reported_time": 3600,  # how long it took says nothing about the lesson
    "show_memory": False,
    "show_signature": False,
    "doc_module": ("tinymoe",),
    "reference_url": {"tinymoe": None},  # names of ours in the code lead to the API
}

# ---- HTML

html_theme = "pydata_sphinx_theme"
html_title = "tinymoe"
html_static_path = ["_static", "_mathjax"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_domain_indices = False
html_theme_options = {
    "logo": {"text": "tinymoe", "alt_text": "tinymoe, start page"},
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_version_warning_banner": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ---- Formulas: MathJax and its font lie beside the pages, see fetch_mathjax.py.

mathjax_path = "mathjax/tex-chtml.js"
mathjax4_config = {
    "loader": {"paths": {"fonts": "[mathjax]/@mathjax"}},
    # A menu and speech would come in more files, from elsewhere.
    "options": {
        "enableMenu": False,
        "enableExplorer": False,
        "enableEnrichment": False,
        "enableSpeech": False,
        "enableBraille": False,
        "menuOptions": {"settings": {"enrich": False, "speech": False, "braille": False}},
    },
}
