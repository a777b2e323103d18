"""Pages of the Python interface, made from docstrings: `python docs/api.py outputs/docs` (`make docs`), then open `outputs/docs/index.html`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script from any directory

import pdoc

import gr00t_fast

# What docs/python.md, docs/server.md and docs/adding_a_network.md name; "!": not the modules below.
MODULES = (
    *("gr00t_fast", r"!gr00t_fast\..*", "gr00t_fast.policy", "gr00t_fast.base.contracts", "gr00t_fast.base.errors"),
    *("gr00t_fast.engine.eager", "gr00t_fast.networks.spec", "gr00t_fast.model.config", "gr00t_fast.inputs.embodiment", "gr00t_fast.inputs.prompt"),
    *("gr00t_fast.serving.client", "gr00t_fast.serving.server", "gr00t_fast.serving.http"),
)
_SOURCE, _HTML = pdoc.doc_ast.get_source, pdoc.render.env.filters["to_html"]


def source_with_comments(thing: Any) -> str:
    """Source code of a module or class, in which the comment behind a field is the field's docstring, as pdoc reads them."""
    return re.sub(r'^( +)(\w+: [^#\n]*?)  # (?!noqa|type:)([^"\n]+)$', r'\1\2\n\1"""\3"""', _SOURCE(thing), flags=re.MULTILINE)


def html_of(docstring: str) -> str:
    """Markdown as HTML; a line that begins with arguments (`name: ...`) or with what is raised begins a paragraph."""
    return str(_HTML(re.sub(r"\n(?=(`?\w+`?, )*`?\w+`?: |Raises )", "\n\n", docstring)))


def main(out: Path) -> None:
    for name in gr00t_fast.__all__:  # the package looks them up when they are first used
        setattr(gr00t_fast, name, getattr(gr00t_fast, name))
    pdoc.doc_ast.get_source = source_with_comments
    pdoc.render.env.filters["to_html"] = html_of
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text=f"gr00t_fast {gr00t_fast.__version__}")
    pdoc.pdoc(*MODULES, output_directory=out)
    print(f"pages: {out / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
