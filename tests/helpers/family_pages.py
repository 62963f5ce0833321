"""The page that says what works on which family: what was found of a case, as a row of docs/families.md."""

import re

from caa_lens.models.adapters.choice import adapter_of
from helpers.families import FAMILIES, OTHERS, absent_here, transformer_lens, wrong_here
from helpers.family_checks import CHECKS, Case, Outcome, outcome
from helpers.models import ROOT

PAGE = ROOT / "docs" / "families.md"
# What a column of the table stands for.
COLUMNS: dict[str, tuple[str, ...]] = {
    "activations": ("extract", "pair_activations", "token_similarity"),
    "steering": ("steer", "steer_batch", "steer_generate", "hook", "hook_generate"),
    "text": ("generate", "generate_uncached", "generate_stream"),
    "scores": ("score_answers", "sweep", "transfer_layers", "measure_texts"),
    "lenses": ("residual_lens", "logit_lens", "logit_lens_in_context"),
    "attribution": ("attribute_logits",),
}
_found: dict[tuple[str, str], Outcome] = {}


def found_of(case: Case, check) -> Outcome:
    """A check's outcome on a bridge that the library has met; it runs once for each family."""
    key = (case.name, check.__name__)
    if key not in _found:
        adapter_of(case.model).meet(case.model)  # whichever check comes first
        _found[key] = outcome(case, check)
    return _found[key]


def row_of(case: Case) -> str:
    """The family's row, without the version."""
    cells, reasons = [], []
    if case.name in (*OTHERS, *wrong_here()):
        refused = found_of(case, CHECKS["extract"]).refused
        assert refused
        return " | ".join([*["no"] * len(COLUMNS), _reason(case, refused)])
    for names in COLUMNS.values():
        found = {name: found_of(case, CHECKS[name]) for name in names}
        refused = [name for name, one in found.items() if one.refused]
        some_slow = any(one.slow for one in found.values())
        words = "yes, whole runs" if some_slow else "yes"
        if refused:
            words = "no" if len(refused) == len(names) else f"not {', '.join(f'`{name}`' for name in refused)}"
        cells.append(words)
        reasons += [_reason(case, one.refused) for one in found.values() if one.refused]
    return " | ".join([*cells, "; ".join(dict.fromkeys(reasons))])


def absent_row(name: str) -> str:
    """The row of a family that the TransformerLens that runs does not load, or not run."""
    assert name in absent_here()
    return " | ".join([*["no"] * len(COLUMNS), "TransformerLens 3 does not load it, or not with today's transformers"])


def _reason(case: Case, sentence: str) -> str:
    """The sentence up to its remedy, without the model's name, sizes and exact versions."""
    name = str(case.model.cfg.model_name)
    return settled(re.split(r": |; ", sentence.replace(repr(name), "it").replace(name, "it"))[0].replace("|", "\\|"))


def settled(words: str) -> str:
    """What does not change with a machine's rounding, or with the next version of a library."""
    words = re.sub(r" by [\d.e+-]+ of (their|its) size", "", words)
    return re.sub(r"(TransformerLens|transformers) [\d.]*\d", r"\1", words)


def written_rows() -> dict[str, str]:
    """What the page says of each family under the TransformerLens that runs."""
    return {
        name: row
        for name, versions, row in re.findall(r"^\| ([^|]+) \| `[^|]+` \| ([^|]+) \| (.*) \|$", text(), re.M)
        if transformer_lens() in versions
    }


def text() -> str:
    return PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""


def written(rows: dict[str, str], old: str) -> str:
    """The page with these rows for the TransformerLens that runs, and the others' of the old page as they were."""
    kept = re.findall(r"^\| ([^|]+) \| `[^|]+` \| ([^|]+) \| (.*) \|$", old, re.M)
    of: dict[str, dict[str, str]] = {}
    for name, versions, row in kept:
        for version in re.findall(r"\d+", versions):
            of.setdefault(name, {})[version] = row
    for name, row in rows.items():
        of.setdefault(name, {})[transformer_lens()] = row
    lines = []
    for name in (name for name in FAMILIES if name in of):
        versions = of[name]
        for row in dict.fromkeys(versions[version] for version in sorted(versions)):
            these = ", ".join(version for version in sorted(versions) if versions[version] == row)
            kind = FAMILIES[name][0].removesuffix("Config")
            lines.append(f"| {name} | `{kind}` | {these} | {row} |")
    head = ["family", "class", "TransformerLens", *COLUMNS, "why not"]
    return "\n".join([HEAD, f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""])


HEAD = """# Families of models

What works on a `TransformerBridge` of which family. Every `yes` was compared number for number with the untouched model
of transformers and torch's own hooks, on a small random model of four blocks, all of whose parameters count.
`tests/families` does it again on every change, and `python docs/families.py` writes this page.

| column | what it stands for |
|---|---|
| activations | `extract`, `pair_activations`, `token_similarity` |
| steering | `steer`, an intervention's hook, both with the model's own `generate` and its cache, and padded batches |
| text | `generate` with and without a cache, `generate_stream` |
| scores | `score_answers`, `sweep`, `transfer_layers`, `measure_texts` |
| lenses | `residual_lens`, `logit_lens` in all readings |
| attribution | `attribute_logits` |

`whole runs`: the same numbers, but the whole text runs again for every condition and every token, after a warning that
says why. Where a family has a window, it is shorter than the prompts here, so that a cache forgets what lies before it.
"""
