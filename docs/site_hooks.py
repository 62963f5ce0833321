"""What the site makes of a page beside Markdown, when it is built (`make docs`); mkdocs calls these functions.

Formulas are written between dollar signs, which code hosts draw, and become MathML, which browsers draw by themselves:
no script and no font is loaded for them. A picture `x.png` that has a sister `x_dark.png` is shown as that one in dark
mode. A wide picture keeps its width on a phone and is pushed sideways there. Links to notebooks lead to rendered copies
(`notebook_pages`). The repository's address stands in `pyproject.toml` alone.
"""

import html
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))
from notebook_pages import NOTEBOOKS, notebook_page  # noqa: E402

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_PICTURE = re.compile(r'<img (?P<before>[^>]*?)src="(?P<path>[^"]*images/)(?P<name>[\w-]+)\.png"(?P<after>[^>]*)>')
_ANY_PICTURE = re.compile(r'<img (?P<given>[^>]*?src="(?P<path>[^"#]+\.png)(?:#[^"]*)?"[^>]*)>')
_NARROW = 520  # pixels of a page: text of a picture that was drawn for this width is legible on a phone
_NOTEBOOK = re.compile(r"\]\(\.\./notebooks/(\w+)\.ipynb\)")


def repository() -> str:
    """The address of the repository, from `pyproject.toml`."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def mathml(latex: str, *, block: bool = False) -> str:
    """A formula as MathML.

    Raises:
        ValueError: for a command that the converter does not know, which it would show as it is.
    """
    found = convert(latex, display="block" if block else "inline")
    unknown = re.findall(r"\\[A-Za-z]+", found)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} in the formula {latex!r} became no MathML: write it in other commands")
    return found


def with_formulas(page: str) -> str:
    """A page's HTML with MathML in the place of what `pymdownx.arithmatex` marked."""

    def drawn(formula: re.Match[str]) -> str:
        block = formula[2] == "["
        found = mathml(html.unescape(formula[3]).strip(), block=block)
        return f'<div class="formula">{found}</div>' if block else found

    return _FORMULA.sub(drawn, page)


def with_dark_pictures(page: str, images: Path = DOCS / "images") -> str:
    """A page's HTML with both sisters of a picture, of which the theme shows one."""

    def sisters(picture: re.Match[str]) -> str:
        if not (images / f"{picture['name']}_dark.png").exists():
            return picture[0]
        names = {"light": picture["name"], "dark": picture["name"] + "_dark"}
        return "".join(
            f'<img {picture["before"]}src="{picture["path"]}{name}.png#only-{mode}"{picture["after"]}>'
            for mode, name in names.items()
        )

    return _PICTURE.sub(sisters, page)


def with_wide_pictures(page: str, images: Path = DOCS / "images") -> str:
    """A page's HTML with the class `wide` at pictures whose text a phone's width would make too small to read.

    Pictures with a dark sister have two pixels for one of the page (`pictures.py`); those of notebooks are all wide.
    """

    def marked(picture: re.Match[str]) -> str:
        file = images / Path(picture["path"]).name
        sister = file.with_name(f"{file.stem.removesuffix('_dark')}_dark.png")
        if file.exists() and _png_width(file) / (2 if sister.exists() else 1) <= _NARROW:
            return picture[0]
        return f'<img class="wide" {picture["given"]}>'

    return _ANY_PICTURE.sub(marked, page)


def _png_width(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[16:20], "big")


def on_config(config: Any) -> Any:
    config.repo_url = repository()
    config.repo_name = repository().removeprefix("https://github.com/")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page and its pictures for every notebook."""
    for path in NOTEBOOKS:
        text, pictures = notebook_page(path, repository())
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, png in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=png))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = "../" * page.file.src_uri.count("/")
    return _NOTEBOOK.sub(rf"]({depth}notebooks/\1.md)", markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    try:
        return with_wide_pictures(with_dark_pictures(with_formulas(content)))
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
