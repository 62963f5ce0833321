"""The documentation site: it builds without a warning, fetches nothing, and its reference is complete."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser

import pytest
import yaml
from helpers.pages import PAGES, ROOT, find

import caa_lens

ROOMS = [name for name in caa_lens.__all__ if (ROOT / "caa_lens" / name).is_dir()]
REFERENCE = [page for page in PAGES if page.parent.name == "api"]
ENTRIES = [entry for page in REFERENCE for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages, by name; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(file.relative_to(folder)): file.read_text(encoding="utf-8") for file in folder.rglob("*.html")}


class _Fetched(HTMLParser):
    """Addresses that a browser asks for by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")


def test_no_page_fetches_anything_from_elsewhere(site):
    assert len(site) > 20
    for name, page in site.items():
        parser = _Fetched()
        parser.feed(page)
        assert len(parser.found) > 3
        assert not [address for address in parser.found if re.match(r"(https?:)?//", address)], name


def test_the_reference_has_every_public_name_once():
    at_top = {name for name in caa_lens.__all__ if name not in ROOMS}
    public = {f"caa_lens.{name}" for name in at_top}
    for room in ROOMS:
        package = importlib.import_module(f"caa_lens.{room}")
        names = {name for name in package.__all__ if not inspect.ismodule(getattr(package, name))}
        public |= {f"caa_lens.{room}.{name}" for name in names - at_top}
    missing = public - set(ENTRIES)
    assert not missing, f"write `::: NAME` on the page of docs/api where it belongs: {sorted(missing)}"
    assert len(set(ENTRIES)) == len(ENTRIES)


def test_every_type_in_a_signature_of_the_reference_has_its_link(site):
    unlinked = {
        path
        for name, page in site.items()
        if name.startswith("api/")
        for path in re.findall(r'<span title="(caa_lens\.[\w.]+)">', page)
        # Types only: defaults that are constants, and the attributes of a table, are no types.
        if re.fullmatch(r"[A-Z]+[a-z]\w*|[A-Z]", path.split(".")[-1]) and path.split(".")[-2].islower()
    }
    assert not unlinked, f"add to a page of docs/api: {sorted(unlinked)}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_docstring_names_the_parameters_that_there_are(entry):
    documented = find(entry)
    members = inspect.getmembers(documented, inspect.isfunction) if inspect.isclass(documented) else []
    for function in [documented, *(member for _, member in members)]:
        doc = inspect.getdoc(function) or ""
        if not inspect.isfunction(function) or "\nArgs:\n" not in doc:
            continue
        described = doc.split("\nArgs:\n")[1].split("\n\n")[0]
        names = {
            name for line in re.findall(r"^    (\w[\w, ]*):", described, re.MULTILINE) for name in line.split(", ")
        }
        assert names
        assert names <= set(inspect.signature(function).parameters), function


def load(path):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_of_smollm2s_positions_is_what_its_script_draws(demo_tokenizer):
    from caa_lens.prompts.prompt_formats import chat_template_format

    script = load(ROOT / "docs" / "images" / "positions.py")
    drawn = script.picture(demo_tokenizer, chat_template_format(demo_tokenizer), *script.COMPLETION)
    assert drawn == (ROOT / "docs" / "images" / "positions_smollm2.html").read_text(encoding="utf-8")


def test_the_drawing_of_llama_2s_positions_is_what_its_script_draws(llama2_tokenizer):
    from caa_lens.prompts.prompt_formats import LLAMA2_CHAT

    script = load(ROOT / "docs" / "images" / "positions.py")
    drawn = script.picture(llama2_tokenizer, LLAMA2_CHAT, *script.LETTER)
    assert drawn == (ROOT / "docs" / "images" / "positions_llama2.html").read_text(encoding="utf-8")


def test_the_tables_of_gpus_are_what_their_command_prints():
    script = load(ROOT / "docs" / "gpu_memory.py")
    page = (ROOT / "docs" / "gpu_memory.md").read_text(encoding="utf-8")
    assert script.table() in page
    assert script.runs() in page


def test_every_place_says_the_same_of_llama_2s_memory_and_disk():
    """Computed here once more, from the shape alone."""
    d_model, d_mlp, n_layers, vocabulary = 4096, 11008, 32, 32000
    block = 4 * d_model**2 + 3 * d_model * d_mlp + 2 * d_model
    parameters = 2 * vocabulary * d_model + n_layers * block + d_model
    single, half = 4 * parameters / 1e9, 2 * parameters / 1e9
    weights, free, taught = f"{single:.1f} GB", f"{1.1 * single:.1f} GB", f"{1.21 * single:.1f} GB"
    two_downloads, one_download = f"{2 * half:.1f} GB", f"{half:.1f} GB"
    read = {path: (ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/reproduction.md")}
    words = {path: " ".join(text.split()) for path, text in read.items()}
    assert f"{one_download} to download and {1.1 * half:.1f} GB of free memory" in words["README.md"]
    assert (
        f"{weights} for the weights, {free} free, and {two_downloads} of downloads with the base" in words["README.md"]
    )
    assert f"{weights} for the weights, {free} of free memory, {taught} with the finet" in words["docs/reproduction.md"]
    assert f"{two_downloads} on the disk" in words["docs/reproduction.md"]
    assert f"a second download of {one_download}" in words["docs/reproduction.md"]
    page = (ROOT / "docs" / "gpu_memory.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if "7B chat" in line)
    shown = [cell.strip() for cell in row.split("|")[2:-1]]
    assert shown == ["float32", *(f"{size:.1f}" for size in (single, 1.1 * single, 1.21 * single, single, 2 * single))]


def test_both_citations_name_the_version_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    page = (ROOT / "docs" / "cite.md").read_text(encoding="utf-8")
    assert f"version = {{{project['version']}}}" in page
    assert citation["references"][0]["doi"] in page
