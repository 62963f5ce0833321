"""The notebooks as pages of the site: their text, code and kept outputs, made when it is built."""

import base64
import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.ipynb"))
_CONTROL = re.compile(r"\x1b\[[0-9;]*m")


def notebook_page(path: Path, repository: str) -> tuple[str, dict[str, bytes]]:
    """(Markdown, pictures by file name) of a notebook.

    Tables and pictures are shown as they were kept. Outputs that need a script are shown as text.
    """
    notebook = nbformat.read(path, as_version=4)
    pictures: dict[str, bytes] = {}
    parts = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(_linked(cell.source))
        if cell.cell_type == "code":
            parts.append(_fenced(cell.source, "python"))
            for index, output in enumerate(cell.outputs):
                parts.append(_shown(output, pictures, f"{path.stem}_{number:02}_{index}.png"))
    where = f"{repository}/blob/main/notebooks/{path.name}"
    colab = where.replace("https://github.com/", "https://colab.research.google.com/github/")
    title, *rest = parts
    first, _, text = title.partition("\n")
    links = f"*[The notebook itself]({where}), to run; [in Colab]({colab}).*"
    return "\n\n".join([first, links, text.strip(), *filter(None, rest)]) + "\n", pictures


def _linked(text: str) -> str:
    """A cell's text: what unfolds keeps its Markdown, links lead to pages."""
    text = re.sub(r"<details>\s*<summary>", '<details markdown="1"><summary>', text)
    text = re.sub(r"\]\(([1-9]_\w+)\.ipynb\)", r"](\1.md)", text)
    return re.sub(r"\]\(\.\./docs/([\w/]+\.md)", r"](../\1", text)


def _fenced(text: str, language: str) -> str:
    return f"~~~~{language}\n{text.rstrip()}\n~~~~" if text.strip() else ""


def _shown(output: nbformat.NotebookNode, pictures: dict[str, bytes], name: str) -> str:
    if output.output_type == "stream":
        return _fenced(_CONTROL.sub("", output.text), "text")
    data = output.get("data", {})
    if "image/png" in data:
        pictures[name] = base64.b64decode(data["image/png"])
        return f"![{_title(data)}]({name})"
    page = data.get("text/html", "")
    if page and "<script" not in page and "<iframe" not in page:
        kept = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
        kept = re.sub(r"<(table|tr) [^>]*>", r"<\1>", kept)  # the theme draws tables that say nothing of their looks
        return f'<div class="output">\n{_on_one_line(kept)}\n</div>'
    return _fenced(data.get("text/plain", ""), "text")


def _on_one_line(page: str) -> str:
    """Blank lines and indents would end a block of HTML within Markdown."""
    return "".join(line.strip() for line in page.splitlines())


def _title(data: dict) -> str:
    """What a figure says of itself: its title without tags."""
    figure = data.get("application/vnd.plotly.v1+json", {})
    title = figure.get("layout", {}).get("title", {}).get("text", "") if isinstance(figure, dict) else ""
    return re.sub(r"<[^>]+>", " ", title).replace("[", "(").replace("]", ")").strip() or "Figure"
