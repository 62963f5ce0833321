"""Run the notebooks from top to bottom and write their outputs into them.

    make notebooks                         # all six, in full
    python notebooks/run.py 3_*.ipynb      # some, from the folder of the notebooks
    python notebooks/run.py --first-cell   # run nothing; only see to it that each begins with what Colab needs

Figures are kept twice: as plotly's JSON, which Jupyter draws and which weighs little, and as a PNG for the sites
that show code, which draw nothing themselves. Both have the figures' own light background. A Chrome or Chromium of this
machine makes the PNGs from the JSON; `BROWSER` names it, if it is not found by itself.
"""

import argparse
import ast
import base64
import copy
import html
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURE, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
BROWSERS = ("chromium", "google-chrome", "chromium-browser", "chrome")
WIDTH = 900  # pixels of a PNG at most, as many as a notebook's column has; a picture that is wider is cut off there
ANSWER, CHECK = "answer", "check"  # tags of the cells of an exercise: one to fill in, and one that judges what is there
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
COLAB = """\
import sys

if "google.colab" in sys.modules:  # Colab has no caa_lens; elsewhere this cell does nothing
    get_ipython().run_line_magic("pip", "install --quiet 'caa-lens[all] @ git+https://github.com/caa-lens/caa_lens'")
"""
"""The first code cell of every notebook."""
# Sites that show code run none of it, nor does a notebook that is not trusted; run, it has them all.
SCRIPT = re.compile(r"<script\b.*?</script>\s*", re.DOTALL)
SIZE = re.compile(r"^(N_\w+ = )(\d+)", re.MULTILINE)

DRAW = """<!doctype html><meta charset="utf-8"><script>%s</script><pre id="drawn"></pre><script>
(async () => {
  const drawn = [];
  for (const figure of %s) {
    const layout = figure.layout, width = layout.width || %d, scale = Math.min(1, %d / width) * %s;
    const size = { format: "png", width, height: layout.height || 450, scale };
    drawn.push(await Plotly.toImage({ data: figure.data, layout }, size));
  }
  document.getElementById("drawn").textContent = JSON.stringify(drawn);
})();
</script>"""


# Where bitsandbytes is installed, TransformerLens imports it, and it says that its kernels for CPUs are not.
QUIET = "import logging\nlogging.getLogger('bitsandbytes').setLevel(logging.ERROR)\ndel logging"


def execute(path: Path, *, pairs: int | None = None, solutions: bool = False, before: str = "") -> Any:
    """A run copy of a notebook, without figures' PNGs; the file stays as it is.

    Args:
        pairs: caps every `N_... = number` of the notebook: as many contrast pairs, questions or steps at most, and a
            third of that for `N_TEST`, whose questions run once for every layer and multiplier.
        solutions: run the code of the hidden solutions too, each where it stands; their outputs are not kept. What the
            solution of an exercise answers is given to the exercise's check, which has to find it right.
        before: code to run first; its output is not kept.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails; the message holds the cell and the error.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [copy.deepcopy(cell) for cell in notebook.cells]
    cells, check = [_extra(f"{QUIET}\n{before}")], ""
    for cell in notebook.cells:
        cells.append(cell)
        check = cell.source if CHECK in cell.metadata.get("tags", []) else check
        if cell.cell_type == "code" and pairs is not None:
            cell.source = SIZE.sub(partial(_capped, pairs), cell.source)
        if cell.cell_type == "markdown" and solutions:
            for code in SOLUTION.findall(cell.source):
                judged = f"_verdict = {check}\nassert _verdict.right, _verdict" if check else ""
                cells.append(_extra(f"{code}\n{judged}"))
                check = ""
    notebook.cells = cells
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # a kernel on a local port warns on every start
            coalesce_streams=True,
            store_widget_state=False,
        )
        client.execute(env={**os.environ, "PLOTLY_RENDERER": "plotly_mimetype"})
    notebook.cells = [cell for cell in notebook.cells if "extra" not in cell.metadata]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]  # progress bars
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    output.data["text/html"] = SCRIPT.sub("", output.data["text/html"])
    _count(notebook)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def put_first_cell(notebook: Any) -> None:
    """See to it that the first code cell is `COLAB`, in place; those behind it count on from there."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if first.id == "cell-colab":
        first.source = COLAB.strip()
        return
    notebook.cells.insert(notebook.cells.index(first), nbformat.v4.new_code_cell(COLAB.strip(), id="cell-colab"))
    _count(notebook)


def structure(notebook: Any) -> list[list[str]]:
    """What a change of the library must not alter unnoticed: by code cell the kind of every output.

    Of a table its header, of a figure the types of its traces; numbers and texts may differ between machines.
    """
    return [[_kind(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def add_pictures(notebook: Any) -> None:
    """Put a PNG beside every figure's JSON, in place."""
    found = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if FIGURE in output.get("data", {})
    ]
    for output, png in zip(found, draw([output.data[FIGURE] for output in found]), strict=True):
        output.data["image/png"] = base64.b64encode(png).decode()


def draw(figures: list[dict], *, finer: float = 1) -> list[bytes]:
    """PNGs of plotly figures (their JSON), at most `WIDTH` pixels wide, with all the colours that they have.

    Args:
        finer: pixels of the file for each of those, for pages on fine screens.

    Raises:
        FileNotFoundError: there is no browser to draw them.
    """
    from PIL import Image
    from plotly.offline import get_plotlyjs

    browser = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        raise FileNotFoundError(f"no browser found to draw figures with, expected one of {', '.join(BROWSERS)}")
    data = json.dumps(figures).replace("<", "\\u003c")  # so that nothing in it can end the script
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "figures.html")
        page.write_text(DRAW % (get_plotlyjs(), data, WIDTH, WIDTH, finer), encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=120000", "--dump-dom"]
        done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=600)
    drawn = re.search(r'<pre id="drawn">(\[.*?\])</pre>', done.stdout, re.DOTALL)
    if drawn is None:
        raise RuntimeError(f"{browser} drew nothing: {done.stderr[-500:]}")
    pngs = []
    for url in json.loads(html.unescape(drawn[1])):
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "png", optimize=True)
        pngs.append(buffer.getvalue())
    return pngs


def _count(notebook: Any) -> None:
    """Number the cells of code from 1 on, as if nothing else had run."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def _capped(pairs: int, size: re.Match[str]) -> str:
    most = max(2, pairs // 3) if size[1].startswith("N_TEST ") else pairs
    return f"{size[1]}{min(int(size[2]), most)}"


def _extra(code: str) -> Any:
    return nbformat.v4.new_code_cell(code, metadata={"extra": True})


def _kind(output: Any) -> str:
    if output.output_type == "stream":
        return output.name
    data = output.data
    if FIGURE in data:
        return "figure of " + ", ".join(trace["type"] for trace in data[FIGURE]["data"])
    if "text/html" in data:
        header = re.search(r"<thead>(.*?)</thead>", "".join(data["text/html"]), re.DOTALL)
        return "table of " + ", ".join(re.findall(r"<th[^>]*>(.*?)</th>", header[1])) if header else "html"
    return type(_literal(data["text/plain"])).__name__


def _literal(text: str) -> object:
    """What a plain output is, if it is a number, a string or a list; else its text, a string again."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="all six by default")
    parser.add_argument(
        "--first-cell", action="store_true", help="run nothing, only put the first cell where it is not"
    )
    options = parser.parse_args()
    for path in options.notebooks:
        print(path.name, flush=True)
        began, used = time.perf_counter(), os.times().children_user
        notebook = nbformat.read(path, as_version=4)
        put_first_cell(notebook)
        nbformat.write(notebook, path)
        if not options.first_cell:
            notebook = execute(path)
            took, computed = time.perf_counter() - began, os.times().children_user - used
            print(f"    {took:.0f} seconds, of a processor {computed:.0f}", flush=True)
            add_pictures(notebook)
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
