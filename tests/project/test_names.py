"""The page that lists every public name is what the stubs and docstrings say."""

import importlib.util

from helpers.models import ROOT


def test_the_page_of_all_names_is_up_to_date():
    spec = importlib.util.spec_from_file_location("names", ROOT / "docs" / "names.py")
    names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(names)
    written = (ROOT / "docs" / "names.md").read_text(encoding="utf-8")
    assert written == names.page(), "run: python docs/names.py"
