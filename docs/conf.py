"""The site: ``sphinx-build -W -n docs docs/_build``.

Sphinx, as the docstrings are reST like optax's; MyST, as the pages are Markdown that GitHub shows.
"""

import collections
import os
import pathlib
import re
import shutil
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "docs" / "tables"  # written anew by each build

project = "absgd_jax"
author = "The absgd_jax authors"
copyright = author
version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # MathJax from the site itself
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub names them

autodoc_typehints = "none"  # the docstrings say what an argument may be
napoleon_attr_annotations = False
napoleon_use_param = False  # several arguments may share a line
copybutton_exclude = ".linenos, .gp, .go"  # prompts and output

html_theme = "furo"
html_title = f"absgd_jax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "default"  # in which a diff is red and green


# Long pages that don't list their sections themselves. The class tells furo that this is meant, as
# its own list is behind a button on most screens.
WITH_CONTENTS = ("choose", "reference", "results/longtail", "results/noise")
CONTENTS = """
```{contents}
:local:
:depth: 1
:class: this-will-duplicate-information-and-it-is-still-useful-here
```
"""

# Files and folders outside docs/ that have a page of the site.
PAGES = {
    "benchmarks/README.md": "docs/results.md",
    "benchmarks/results": "docs/tables.md",
    "CHANGELOG.md": "docs/changelog.md",
}


def setup(app):
    app.connect("builder-inited", write_tables)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)


def write_tables(app):
    """A page for each benchmark, with the tables of all its folders."""
    pages = collections.defaultdict(str)
    for table in sorted(RESULTS.glob("*/table.md")):
        folder = table.parent.name
        pages[benchmark(folder)] += f"\n## {folder}\n\n{table.read_text()}"
    shutil.rmtree(TABLES, ignore_errors=True)
    TABLES.mkdir()
    for name, text in pages.items():
        contents = CONTENTS if text.count("\n## ") > 1 else ""
        (TABLES / f"{name}.md").write_text(f"# {name}\n{contents}{text}")


def benchmark(folder):
    """The one that wrote the folder of results, by the command above its table."""
    table = (RESULTS / folder / "table.md").read_text()
    return re.match(r"`python -m benchmarks(?:\.(\w+))? ", table)[1] or "tour"


def read_page(app, page, text):
    if page in WITH_CONTENTS:
        text[0] = text[0].replace("\n", f"\n{CONTENTS}", 1)  # below the title
    text[0] = to_pages(text[0], f"docs/{page}")


def read_included(app, path, page, text):
    text[0] = to_pages(text[0], os.path.normpath(f"docs/{path}"))


def to_pages(text, file):
    """Links that lead from the file to others on GitHub lead to the pages of these here."""

    def to_page(link):
        path, mark, heading = link[0].partition("#")
        path = os.path.normpath(os.path.join(os.path.dirname(file), path))
        path = PAGES.get(path, path)
        folder = re.fullmatch(r"benchmarks/results/([^/]+)(?:/table\.md)?", path)
        if folder:
            path, mark = f"docs/tables/{benchmark(folder[1])}.md", "#"
            heading = folder[1].replace(".", "")
        return f"/{os.path.relpath(path, 'docs')}{mark}{heading}"

    text = re.sub(r"^(\s*)%", r"\1\%", text, flags=re.MULTILINE)  # or MyST reads a comment
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    text = re.sub(r"(?<=\d\d\.\d) / (?=\d\d\.\d)", "\N{NO-BREAK SPACE}/ ", text)
    return re.sub(r"(?<=\]\()(?!\w+:|#)[^)\s]+", to_page, text)
