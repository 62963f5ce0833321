"""Many behaviors from three places, each split in three, as A/B letters and as completions.

| place | what is there | forms |
|---|---|---|
| bundled | the package's own sets | as they are; A/B sets also as completions |
| written | `experiments/data/contrast_sets`, sets written for it: topics, tones, tenses, formats | completions |
| evals | model-written evaluations and the CAA authors' sets, if they are on this machine | A/B and completions |

The evals are not ours to copy. They lie in the folder that `CAA_LENS_EVALS` names, or in `../shared/data` beside the
project: `mwe/*.jsonl`, `mwe/lm_generated/*.jsonl`, `mwe/persona/*.jsonl` (of the Yes/No statements every third file, by
name, so that one kind of question is not most of all) and `caa/*.json`. What is not there is left out.

An A/B question becomes one for completions by taking its choices away, and the options' texts are the answers. A
Yes/No statement becomes A/B by giving it the two choices, in either order. Only questions with two options are used,
each once, and the parts of both forms are the same questions. Letters are made even in each part, and so are Yes and
No.
"""

import os
import random
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.running.settings import BUNDLED, RunConfig

if TYPE_CHECKING:
    from caa_lens.contrast.pair import ContrastPair
    from caa_lens.contrast.sets import ContrastSet

LETTERS, COMPLETIONS = "letters", "completions"
N_TRAIN, N_VALIDATION, N_TEST, FEWEST_TEST = 24, 8, 24, 16
WRITTEN = Path(__file__).resolve().parents[1] / "data" / "contrast_sets"
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
EVERY_PERSONA = 3
_CHOICES = re.compile(r"\s*(?:(?:your )?choices:)?\s*\(A\)\s*\Z", re.IGNORECASE)
_YES_NO = {"Yes", "No"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A behavior, and where its pairs come from."""

    name: str
    place: str
    file: Path | None = None
    """None: it is bundled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A behavior in one form: pairs to extract from, to choose by, and to report on. No question is in two of them."""

    train: "ContrastSet"
    validation: "ContrastSet"
    test: "ContrastSet"


def evals_folder() -> Path:
    """Where model-written evaluations lie, if they are on this machine."""
    given = os.environ.get("CAA_LENS_EVALS")
    return Path(given).expanduser() if given else BESIDE


def sources(config: RunConfig) -> tuple[Source, ...]:
    """All behaviors there are here: of the bundled sets those of the run, and all where the run has the paper's."""
    bundled = [name for name in BUNDLED if config.data == "paper" or name in config.behaviors]
    folder = evals_folder()
    personas = sorted((folder / "mwe" / "persona").glob("*.jsonl"))[::EVERY_PERSONA]
    evals = [
        *sorted((folder / "mwe").glob("*.jsonl")),
        *sorted((folder / "mwe" / "lm_generated").glob("*.jsonl")),
        *personas,
        *sorted((folder / "caa").glob("*.json")),
    ]
    found = [
        *(Source(name=name, place="bundled") for name in bundled),
        *(Source(name=file.stem, place="written", file=file) for file in sorted(WRITTEN.glob("*.jsonl"))),
        *(Source(name=file.stem, place="evals", file=file) for file in evals),
    ]
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two sets are called {', '.join(sorted(twice))}: rename the files in {folder}")
    return tuple(found)


def forms(source: Source) -> tuple[str, ...]:
    """A/B and completions where the pairs have options; completions alone where they have not."""
    return (LETTERS, COMPLETIONS) if _pairs(source)[0].is_ab else (COMPLETIONS,)


@lru_cache(maxsize=256)
def parts(source: Source, form: str, seed: int) -> Parts:
    """A behavior's three parts in a form.

    Raises:
        ValueError: for too few questions.
    """
    from caa_lens.contrast.sets import ContrastSet

    pairs = _pairs(source)
    if len(pairs) < N_TRAIN + N_VALIDATION + FEWEST_TEST:
        least = N_TRAIN + N_VALIDATION + FEWEST_TEST
        raise ValueError(f"{source.name} has {len(pairs)} questions that can be used, expected at least {least}")
    ends = (0, N_TRAIN, N_TRAIN + N_VALIDATION, N_TRAIN + N_VALIDATION + N_TEST)
    ordered = _mixed(pairs, random.Random(f"{seed} {source.name}"))
    found = []
    for first, last in pairwise(ends):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # uneven letters, which are made even below
            part = ContrastSet.from_pairs(ordered[first:last], name=source.name)
        if form == COMPLETIONS and part.kind == "ab":
            part = replace(part, pairs=tuple(map(as_completions, part)))
        found.append(part.balance_letters(seed=seed) if form == LETTERS else part)
    return Parts(train=found[0], validation=found[1], test=found[2])


def as_completions(pair: "ContrastPair") -> "ContrastPair":
    """An A/B pair's question without its choices, and the texts of its options as the answers.

    Raises:
        ValueError: if what is left is no pair of completions.
    """
    from caa_lens.contrast.messages import last_words, with_last_words
    from caa_lens.contrast.pair import ContrastPair

    options = pair.options
    question = with_last_words(pair.question, _CHOICES.sub("", last_words(pair.without_options)))
    return ContrastPair(question=question, positive=options[pair.positive], negative=options[pair.negative])


def as_letters(pair: "ContrastPair", *, first: str) -> "ContrastPair":
    """A pair of two short answers as an A/B pair, `first` being option (A)."""
    from caa_lens.contrast.messages import last_words, with_last_words
    from caa_lens.contrast.pair import ContrastPair

    second = pair.negative if first == pair.positive else pair.positive
    asked = f"{last_words(pair.question)}\n\nChoices:\n (A) {first}\n (B) {second}"
    question = with_last_words(pair.question, asked)
    letters = ("(A)", "(B)") if first == pair.positive else ("(B)", "(A)")
    return ContrastPair(question=question, positive=letters[0], negative=letters[1])


@lru_cache(maxsize=256)
def _pairs(source: Source) -> "tuple[ContrastPair, ...]":
    """Every question once; A/B where it can be."""
    loaded = _load(source)
    if not loaded[0].is_ab and {pair.positive for pair in loaded} <= _YES_NO:
        loaded = [as_letters(pair, first=("Yes", "No")[i % 2]) for i, pair in enumerate(loaded)]
    found, seen = [], set()
    for pair in loaded:
        whole = pair
        if pair.is_ab:
            try:
                whole = as_completions(pair)
            except ValueError:
                continue
            if len(pair.options) != 2:
                continue
        if whole.question not in seen:
            seen.add(whole.question)
            found.append(pair)
    return tuple(found)


def _load(source: Source) -> "Sequence[ContrastPair]":
    """The pairs of a file, without the rows that are none."""
    from caa_lens.contrast.files import ContrastFileError
    from caa_lens.contrast.sets import ContrastSet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uneven letters, which are made even in every part
        if source.file is None:
            return list(ContrastSet.load(source.name))
        try:
            return list(ContrastSet.load(source.file))
        except ContrastFileError as error:
            bad = {line for line, _ in error.problems}
            lines = source.file.read_text(encoding="utf-8-sig").split("\n")
            if None in bad or source.file.suffix != ".jsonl":
                raise
            with tempfile.TemporaryDirectory() as folder:
                kept = Path(folder) / source.file.name
                kept.write_text("\n".join(text for n, text in enumerate(lines, start=1) if n not in bad))
                return list(ContrastSet.load(kept))


def _mixed(pairs: "Sequence[ContrastPair]", generator: random.Random) -> "list[ContrastPair]":
    """The pairs in random order; those whose positive answer is Yes and those whose is No by turns."""
    shuffled = generator.sample(pairs, len(pairs))
    by_answer: dict[str, list[ContrastPair]] = {"Yes": [], "No": []}
    for pair in shuffled:
        text = pair.options[pair.positive] if pair.is_ab else pair.positive
        if text not in by_answer:
            return shuffled
        by_answer[text].append(pair)
    return [pair for both in zip(by_answer["Yes"], by_answer["No"], strict=False) for pair in both]
