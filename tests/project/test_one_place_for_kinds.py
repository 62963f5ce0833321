"""Which of TransformerLens' two kinds a model is, is asked in one place: by the adapters, and by those that load."""

import ast
import re

import pytest
from helpers.models import ROOT

PACKAGE = ROOT / "caa_lens"
KINDS = {"TransformerBridge", "HookedTransformer", "original_model", "is_bridge"}
ONE_KIND_ALONE = {"hook_out", "past_kv_cache", "past_key_values", "stop_at_layer", "start_at_layer"}
STREAM = {"hook_resid_post"}  # its name as files and TransformerLens' own hooks have it
MAY_ASK = ("models/adapters/", "models/loading/", "models/checks.py")
# Who may say a word all the same, and why.
ALLOWED = {
    "provenance.py": STREAM,  # a vector's `hook_name`
    "engine/edits.py": {"hook_out"},  # the (name, function) pair that either kind is given
}


def words_of(source):
    """Every name that a source uses, with its line: also as an attribute's name or a hook point's in a string.

    Docstrings are none, and neither is what is said to people, which has spaces.
    """
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in said and " " not in text:
                yield from ((node.lineno, word) for word in re.findall(r"\w+", text))
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
                yield node.lineno, word
            case ast.alias(name=path) | ast.ImportFrom(module=str(path)):
                yield from ((node.lineno, word) for word in path.split("."))
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                yield node.lineno, word


def asked(source, place):
    """Where a module of the package asks which kind a model is, as "line word"."""
    if place.startswith(MAY_ASK):
        return []
    words = (KINDS | ONE_KIND_ALONE | STREAM) - ALLOWED.get(place, set())
    return [f"{line} {word}" for line, word in sorted(words_of(source)) if word in words]


def test_nothing_else_asks_which_kind_a_model_is():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        found[place] = asked(file.read_text(encoding="utf-8"), place)
    assert {place: lines for place, lines in found.items() if lines} == {}
    assert len(found) > 100


def test_what_is_allowed_is_also_used():
    for place, words in ALLOWED.items():
        assert words <= {word for _, word in words_of((PACKAGE / place).read_text(encoding="utf-8"))}, place


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("from transformer_lens import HookedTransformer", "HookedTransformer"),
        ("def f(model: 'TransformerBridge'): ...", "TransformerBridge"),
        ("if type(model).__name__ == 'TransformerBridge': pass", "TransformerBridge"),
        ("import transformer_lens\nisinstance(m, transformer_lens.HookedTransformer)", "HookedTransformer"),
        ("config = model.original_model.config", "original_model"),
        ("hasattr(model, 'original_model')", "original_model"),
        ("from caa_lens.models import is_bridge as other", "is_bridge"),
        ("model.blocks[2].hook_out", "hook_out"),
        ("model(tokens, past_kv_cache=cache)", "past_kv_cache"),
        ("model(tokens, **{'stop_at_layer': 3})", "stop_at_layer"),
        ("model.hook_dict[f'blocks.{layer}.hook_resid_post']", "hook_resid_post"),
    ],
)
def test_a_place_that_asks_is_found_however_it_asks(source, word):
    (found,) = asked(source, "measures/answers.py")
    assert found.split()[1] == word
    assert asked(source, "models/adapters/bridge.py") == []


def test_what_is_said_to_people_is_not_asked():
    source = (
        '"""Of HookedTransformer."""\ndef f():\n    """Of hook_out."""\n    raise TypeError("no TransformerBridge")'
    )
    assert asked(source, "measures/answers.py") == []
