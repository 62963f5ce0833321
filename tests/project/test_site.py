"""The documentation site: it builds without a warning, fetches nothing, and its reference is complete."""

import html
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser

import nbformat
import pytest
import yaml
from helpers.browser import CHROMIUM, open_page
from helpers.driven_browser import DrivenBrowser
from helpers.pages import PAGES, ROOT, find
from PIL import Image

import caa_lens

ROOMS = [name for name in caa_lens.__all__ if (ROOT / "caa_lens" / name).is_dir()]
REFERENCE = [page for page in PAGES if page.parent.name == "api"]
ENTRIES = [entry for page in REFERENCE for entry in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]


@pytest.fixture(scope="module")
def site_folder(tmp_path_factory):
    """The built site; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(site_folder):
    """The built pages, by name."""
    return {
        str(file.relative_to(site_folder)): file.read_text(encoding="utf-8") for file in site_folder.rglob("*.html")
    }


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
        assert 'data-md-component="source"' not in page  # the theme's script would ask the code host for stars


def test_no_style_sheet_fetches_anything_from_elsewhere(site_folder):
    sheets = list(site_folder.rglob("*.css"))
    assert len(sheets) > 2
    assert not [sheet for sheet in sheets if re.search(r"""url\(["']?(https?:)?//|@import""", sheet.read_text())]


def prose(page):
    """A page's text without code, scripts and MathML."""
    for tag in ("script", "style", "pre", "code", "math", "svg"):
        page = re.sub(rf"<{tag}[ >].*?</{tag}>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def formulas_in(text):
    """The formulas of a page's Markdown, its code apart."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\$\$.+?\$\$|\$[^$\n]+?\$", text, re.DOTALL)


def test_every_formula_is_mathml_and_none_is_left_as_it_was_written(site):
    drawn = 0
    for name, page in site.items():
        assert "arithmatex" not in page, name
        assert not re.search(r"\$|\\[(\[]|\\[a-z]{2,}", prose(page)), name
        assert "\\" not in "".join(re.findall(r"<math.*?</math>", page, re.DOTALL)), name
        source = ROOT / "docs" / name.replace(".html", ".md")
        if source.exists() and not name.startswith("api/"):
            assert page.count("<math") == len(formulas_in(source.read_text(encoding="utf-8"))), name
            drawn += page.count("<math")
    assert drawn > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_code_host_can_draw_the_formulas_too(page):
    for formula in formulas_in(page.read_text(encoding="utf-8")):
        assert not re.search(r"\\[^A-Za-z]|\\operatorname", formula), f"a code host eats this or refuses it: {formula}"


def test_a_formula_that_cannot_be_drawn_is_an_error_and_not_shown_as_it_is():
    hooks = load(ROOT / "docs" / "site_hooks.py")
    assert "<mfrac>" in hooks.mathml(r"\frac{a}{b}")
    with pytest.raises(ValueError, match=r"\\nosuchthing in the formula"):
        hooks.mathml(r"a + \nosuchthing")


def test_a_picture_with_a_dark_sister_is_shown_twice_and_any_other_once(tmp_path):
    hooks = load(ROOT / "docs" / "site_hooks.py")
    (tmp_path / "a_dark.png").touch()
    page = hooks.with_dark_pictures('<img alt="A" src="../images/a.png"><img src="images/b.png">', tmp_path)
    light, dark = '<img alt="A" src="../images/a.png#only-light">', '<img alt="A" src="../images/a_dark.png#only-dark">'
    assert page == light + dark + '<img src="images/b.png">'


def test_a_picture_too_wide_for_a_phone_is_marked_and_a_narrow_one_is_not(tmp_path):
    hooks = load(ROOT / "docs" / "site_hooks.py")
    for name, width in {"narrow": 500, "wide": 800, "dense": 960, "dense_dark": 960, "large": 1290}.items():
        Image.new("L", (width, 4)).save(tmp_path / f"{name}.png")

    def marked(path):
        return 'class="wide"' in hooks.with_wide_pictures(f'<img alt="A" src="{path}">', tmp_path)

    for path in ("images/narrow.png", "../images/dense.png#only-light", "images/dense_dark.png#only-dark"):
        assert not marked(path), path
    for path in ("images/wide.png", "images/large.png", "1_of_a_notebook_23_0.png"):
        assert marked(path), path


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
@pytest.mark.parametrize("name", ["index", "interpretation", "notebooks/1_caa_from_scratch"])
def test_wide_pictures_are_640_pixels_wide_on_a_phone_whose_page_does_not_scroll_sideways(name, site_folder, tmp_path):
    with DrivenBrowser(tmp_path) as page:
        page.size(390, 844, phone=True)
        page.open((site_folder / f"{name}.html").as_uri())
        widths = page.value("[...document.querySelectorAll('img.wide')].map((one) => one.offsetWidth).filter(Boolean)")
        assert set(widths) == {640}
        assert page.value("document.documentElement.scrollWidth") == 390


def pictures_of(page):
    """(alt text, file) of every picture on a page of Markdown."""
    return [
        (alt, page.parent / path)
        for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_picture_says_what_is_seen_and_is_small(page):
    for alt, path in pictures_of(page):
        assert len(alt.split()) > 3, f"{path.name}: say what is seen, not what it is called"
        assert path.stat().st_size < 150_000, path.name
        dark = path.with_name(f"{path.stem}_dark.png")
        if dark.exists():
            assert dark.stat().st_size < 150_000
            with Image.open(path) as one, Image.open(dark) as other:
                assert one.size == other.size


def test_every_picture_of_the_script_is_there_and_on_a_page_beside_its_command():
    script = load(ROOT / "docs" / "pictures.py")
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name in script.PICTURES:
        assert (script.IMAGES / f"{name}.png").exists()
        assert (script.IMAGES / f"{name}_dark.png").exists()
        assert any(
            f"images/{name}.png" in text and re.search(rf"python docs/pictures\.py[\w ]*\b{name}\b", text)
            for text in texts.values()
        ), name


def test_the_first_page_opens_with_pictures():
    _, after_title = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").split("\n\n", 1)
    assert after_title.startswith("![")
    assert len(re.findall(r"!\[", after_title.split("`caa_lens` steers")[0])) >= 6


SEARCH = """<script>
addEventListener("load", () => setTimeout(() => {
  const box = document.querySelector("[data-md-component=search-query]");
  box.focus();
  box.value = "WORD";
  for (const event of ["input", "keyup"]) box.dispatchEvent(new Event(event, {bubbles: true}));
  setTimeout(() => {
    const links = [...document.querySelectorAll(".md-search-result__link")].map((link) => link.getAttribute("href"));
    document.body.setAttribute("data-found", links.join(" "));
  }, 4000);
}, 1500));
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_search_works_when_the_site_is_opened_from_a_folder(site_folder, tmp_path):
    page = site_folder / "searching.html"  # beside the others, whose scripts it loads
    page.write_text((site_folder / "index.html").read_text(encoding="utf-8") + SEARCH.replace("WORD", "kurtosis"))
    try:
        document, console = open_page(page, tmp_path)
    finally:
        page.unlink()
    found = re.search(r'data-found="([^"]*)"', document)
    assert found, console
    assert any("interpretation.html" in link for link in found[1].split())
    assert not [line for line in console if "ERROR" in line]


def test_every_notebook_is_a_page_with_its_code_and_pictures(site, site_folder):
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page, notebook = site[f"notebooks/{path.stem}.html"], nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert page.count('<div class="highlight">') >= len(code)
        kept = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
        shown = re.findall(rf'src="({path.stem}_\d+_\d+\.png)"', page)
        assert len(shown) == kept
        assert all((site_folder / "notebooks" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
        assert "&lt;summary" not in page
        assert not re.search(r"\*\*\w|```", prose(page)), "Markdown that was not drawn"


ADDRESS = re.compile(r"github\.com/[\w.-]+/caa[-_]lens\b")


def test_every_mention_of_the_repository_is_the_one_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    truth = project["urls"]["Repository"]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    kinds = {".md", ".py", ".toml", ".yml", ".cff", ".txt", ".ipynb", ".html"}
    files = [ROOT / name for name in tracked if name] or PAGES
    mentions = {
        (str(file.relative_to(ROOT)), found)
        for file in files
        if file.suffix in kinds and file.exists()
        for found in ADDRESS.findall(file.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in mentions} >= {"README.md", "pyproject.toml"}
    assert {found for _, found in mentions} == {truth.removeprefix("https://")}


def test_no_text_names_the_host_of_a_package_registry():
    """Whoever installs has a registry of their own; a page that names one is wrong for the others."""
    hosts = re.compile(
        "|".join(["pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs", "ana" + r"conda\.org"])
    )
    folders = ("caa_lens", "docs", "experiments", "notebooks", "tests", "benchmarks", ".ci")
    every = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    texts = [
        path for path in every if path.suffix in {".md", ".py", ".ipynb", ".html", ".toml", ".txt", ".yml", ".json"}
    ]
    found = [path.name for path in texts if hosts.search(path.read_text(encoding="utf-8"))]
    assert len(texts) > 500
    assert not found


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
