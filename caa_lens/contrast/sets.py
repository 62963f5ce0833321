"""Contrast sets: pairs of one behavior and one kind, A/B or completions.

A set is what a steering vector is extracted from and measured on.

Letters have to be even: with (B) as the positive answer of two pairs in three, the mean difference between
positive and negative activations is mostly the direction from one letter to the other.
`ContrastSet.balance_letters` exchanges option texts until they are even.
"""

import hashlib
import inspect
import json
import numbers
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from caa_lens.arguments import as_seed, check_count, check_list, describe, is_unicode
from caa_lens.contrast import files as contrast_files
from caa_lens.contrast.checking.letters import uneven
from caa_lens.contrast.errors import check_columns, check_on_bad
from caa_lens.contrast.files import bundled_names
from caa_lens.contrast.messages import Question, plain_data
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.rows import pairs_of
from caa_lens.contrast.tables import source_of
from caa_lens.provenance import PAIR_HASHES

if TYPE_CHECKING:
    import pandas

    from caa_lens.contrast.checking.set_check import ContrastCheck

# The CAA authors' files have these names in every behavior's folder: there the folder names the behavior.
_SAME_IN_EVERY_FOLDER = {"generate_dataset", "test_dataset_ab", "test_dataset_open_ended"}


class LetterBalanceWarning(UserWarning):
    """The answer letters of an A/B set are so uneven that its vector would be mostly the letter."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ContrastSet(Sequence[ContrastPair]):
    """Contrast pairs of one behavior and one kind. Every change gives a new set.

    Raises:
        ValueError: there are no pairs, or A/B pairs and completions are mixed.
    """

    name: str
    """The behavior, as frames and figures call it."""
    pairs: tuple[ContrastPair, ...]
    source: str = field(default="memory", compare=False)
    """Where the pairs come from: `bundled:<name>`, a path, or `memory`."""
    dropped: int = field(default=0, compare=False)
    """How many rows of the source were left out as no pairs, with `on_bad="drop"`."""

    def __new__(cls, *given: object, **_fields: object) -> "ContrastSet":
        if given:
            raise TypeError(
                "ContrastSet takes no values without their names: make a set with ContrastSet.from_pairs([(question, "
                "positive, negative), ...]) or ContrastSet.load(a bundled name or a file)"
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not is_unicode(self.name):
            raise TypeError(f"a contrast set's name must be a text, got {self.name!r}")
        if other := [type(pair).__name__ for pair in self.pairs if not isinstance(pair, ContrastPair)]:
            raise TypeError(f"got a {other[0]} among the pairs: make a set of texts with ContrastSet.from_pairs(...)")
        if not self.pairs:
            raise ValueError(f"contrast set {self.name!r} has no pairs, expected at least one")
        n_ab = sum(pair.is_ab for pair in self.pairs)
        if 0 < n_ab < len(self.pairs):
            raise ValueError(
                f"contrast set {self.name!r} mixes {n_ab} A/B pairs with {len(self.pairs) - n_ab} pairs of "
                "completions: make a set of each kind"
            )

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
        on_bad: Literal["raise", "drop"] = "raise",
    ) -> "ContrastSet":
        """A bundled set by its name, or a file in any form of `caa_lens.contrast.files`: JSON, CSV, TSV, parquet.

        A bundled name wins over a file that is called the same: pass a `Path` for the file.

        Args:
            name: the behavior, by default the bundled name or the file's stem.
            columns: what the file calls `question`, `positive` and `negative`, where it is none of the known names.
            on_bad: "raise", or "drop" to leave out rows that are no pairs, with a warning that says which and why.

        Raises:
            ContrastFileError: a `ValueError` that says what in the file does not fit, and where.

        Warns:
            DroppedRowsWarning: rows were left out.
            LetterBalanceWarning: as `warn_if_unbalanced`.
        """
        if not isinstance(name_or_path, str | Path):
            raise TypeError(
                f"got a {type(name_or_path).__name__}, expected the name of a bundled set or a file: pairs in memory "
                "become a set with ContrastSet.from_pairs"
            )
        check_columns(columns)
        check_on_bad(on_bad)
        file = contrast_files.locate(name_or_path)
        reading = contrast_files.read(file, ContrastPair, columns=columns, on_bad=on_bad)
        pairs = reading.settled(on_bad, stacklevel=3)
        if isinstance(name_or_path, str) and name_or_path in bundled_names():
            stem, source = name_or_path, f"bundled:{name_or_path}"
        else:
            path = Path(name_or_path)
            stem, source = contrast_files.stem(path), str(path)
            if stem in _SAME_IN_EVERY_FOLDER:
                stem = path.absolute().parent.name
        n_dropped = len(reading.problems)
        loaded = cls(name=stem if name is None else name, pairs=pairs, source=source, dropped=n_dropped)
        loaded.warn_if_unbalanced(stacklevel=3)
        return loaded

    @classmethod
    def from_pairs(
        cls,
        pairs: Any,
        *,
        name: str = "pairs",
        columns: Mapping[str, str] | None = None,
        on_bad: Literal["raise", "drop"] = "raise",
    ) -> "ContrastSet":
        """A set of what is in memory: a list of pairs, a data frame (pandas, polars, Arrow), a `datasets.Dataset`.

        A pair in a list is a `ContrastPair`, (question, positive, negative), or a mapping. A question is a text, or a
        list of messages. What columns and keys mean, `caa_lens.contrast.rows` says, for data in memory as for files.

        Args:
            name: the behavior.
            columns: what the data call `question`, `positive` and `negative`, where it is none of the known names.
            on_bad: "raise", or "drop" to leave out rows that are no pairs, with a warning that says which and why.

        Raises:
            TypeError: for anything else.
            ContrastFileError: a `ValueError` for what cannot be a pair, with its number, counted from 1.

        Warns:
            DroppedRowsWarning: rows were left out.
            LetterBalanceWarning: as `warn_if_unbalanced`.
        """
        check_columns(columns)
        check_on_bad(on_bad)
        source = source_of(pairs, on_bad=on_bad)
        kinds: Literal["most", "any"] = "most" if on_bad == "drop" else "any"
        reading = pairs_of(source, ContrastPair, columns=columns, on_bad=on_bad, kinds=kinds)
        found = cls(name=name, pairs=reading.settled(on_bad, stacklevel=3), dropped=len(reading.problems))
        found.warn_if_unbalanced(stacklevel=3)
        return found

    @property
    def kind(self) -> Literal["ab", "completions"]:
        """`ab` where the answers are letters of options in the question, else `completions`."""
        return "ab" if self.pairs[0].is_ab else "completions"

    @property
    def behavior(self) -> str:
        """The behavior that the positive answers show: `name`, in the words of frames."""
        return self.name

    @property
    def letter_counts(self) -> Counter[str]:
        """How often each letter, such as `(A)`, is the positive answer; empty for completions."""
        return Counter(pair.positive for pair in self.pairs if pair.is_ab)

    def warn_if_unbalanced(self, *, stacklevel: int = 2) -> None:
        """Warns where one letter is over 0.6 of the positive, or negative, answers; of 4 to 9 pairs, if it is all."""
        if found := uneven(self.pairs):
            split = ", ".join(f"{letter} {n}" for letter, n in sorted(found[1].items()))
            warnings.warn(
                f"{self.name!r} has uneven letters: its {found[0]} answers are {split}. A vector from it would be "
                "mostly the letter, not the behavior: use .balance_letters() first, or --balance on the command line",
                LetterBalanceWarning,
                stacklevel=stacklevel,
            )

    def check(self, *, other: "ContrastSet | None" = None, model: Any = None) -> "ContrastCheck":
        """What in these pairs is not the behavior and may be in their vector: a linter, one line a finding.

        Duplicates, near duplicates and mirrored pairs; answers of one side that are longer; words of one side only;
        letters that are uneven or can be guessed from their place; `(1)` or `b.` taken for completions; special tokens.
        `caa_lens.contrast.checking` says from where on each counts. Each finding has its pairs' numbers.

        Args:
            other: another set, in which no pair of this one should be, as in train.check(other=test).
            model: a model or its tokenizer, to look for its special tokens and for answers that begin in the middle of
                a token.

        Raises:
            TypeError: for anything else.
        """
        from caa_lens.contrast.checking.set_check import checked

        if other is not None:
            check_contrast_set(other)
        return checked(self, other=other, model=model)

    def balance_letters(self, seed: int | None = 0) -> "ContrastSet":
        """The set with as few pairs swapped as make the letters even, drawn with `seed`; the order stays.

        Each two letters are balanced among the pairs that oppose just these: afterwards (A) is positive
        against (B) as often as (B) against (A), give or take one.
        """
        if self.kind != "ab":
            raise ValueError(f"contrast set {self.name!r} has completions: only A/B pairs have letters to balance")
        where: dict[tuple[str, str], list[int]] = defaultdict(list)  # (positive, negative): indices of the pairs
        for i, pair in enumerate(self.pairs):
            where[pair.positive, pair.negative].append(i)
        generator = random.Random(as_seed(seed))
        swap: set[int] = set()
        for (positive, negative), indices in sorted(where.items()):
            surplus = len(indices) - len(where.get((negative, positive), ()))
            if surplus > 1:
                swap.update(generator.sample(indices, surplus // 2))
        return replace(self, pairs=tuple(p.swapped() if i in swap else p for i, p in enumerate(self.pairs)))

    @overload
    def split(self, *, test: int | float, seed: int | None = 0) -> "tuple[ContrastSet, ContrastSet]": ...
    @overload
    def split(
        self, *, test: int | float, validation: int | float, seed: int | None = 0
    ) -> "tuple[ContrastSet, ContrastSet, ContrastSet]": ...
    def split(
        self, *, test: int | float, validation: int | float | None = None, seed: int | None = 0
    ) -> "tuple[ContrastSet, ...]":
        """(train, test), shuffled with `seed` (None: a fresh one): disjoint, and together every pair.

        With `validation`, (train, validation, test): pairs to extract from, to choose on, to report. The test pairs are
        the same with and without it. Each is a number of pairs (`int`) or a share of them (`float` between 0 and 1).
        """
        seed = as_seed(seed)
        n_test = self._part("test", test, len(self))
        n_validation = 0 if validation is None else self._part("validation", validation, len(self) - n_test)
        order = random.Random(seed).sample(self.pairs, len(self))
        held_out, chosen_on, left = (
            order[:n_test],
            order[n_test : n_test + n_validation],
            order[n_test + n_validation :],
        )
        parts = (left, held_out) if validation is None else (left, chosen_on, held_out)
        return tuple(replace(self, pairs=tuple(part)) for part in parts)

    def _part(self, name: str, given: int | float, n_left: int) -> int:
        number = isinstance(given, numbers.Real) and not isinstance(given, bool)
        whole = isinstance(given, numbers.Integral)
        n = int(given) if whole else round(float(given) * len(self)) if number and 0 < given < 1 else 0
        if not number or not 0 < n < n_left:
            beside = "" if n_left == len(self) else f", of which {len(self) - n_left} are the test's"
            sides = "each side" if n_left == len(self) else "every side"
            raise ValueError(
                f"got {name}={given!r} for the {len(self)} pairs of {self.name!r}{beside}, expected a number of pairs "
                f"(int) or a share between 0 and 1 (float) that leaves at least one pair on {sides}"
            )
        return n

    def sample(self, n: int, seed: int | None = 0) -> "ContrastSet":
        """`n` of the pairs, none twice, drawn with `seed` and kept in order."""
        seed = as_seed(seed)
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or not 0 < n <= len(self):
            raise ValueError(f"got n={n!r}, expected 1 to {len(self)}, the number of pairs of {self.name!r}")
        chosen = sorted(random.Random(seed).sample(range(len(self)), int(n)))
        return replace(self, pairs=tuple(self.pairs[i] for i in chosen))

    def without(self, rows: Iterable[int]) -> "ContrastSet":
        """The set without pairs of these numbers, counted from 1, as `check` gives them in `rows`.

        Raises:
            ValueError: there is no pair of such a number, or none would be left.
        """
        out = {check_count("rows", n) for n in check_list("rows", list(rows), int)}
        if out and max(out) > len(self):
            raise ValueError(f"got the row {max(out)}, expected 1 to {len(self)}, the number of pairs of {self.name!r}")
        return replace(self, pairs=tuple(pair for n, pair in enumerate(self.pairs, start=1) if n not in out))

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> ContrastPair: ...
    @overload
    def __getitem__(self, index: slice) -> "ContrastSet": ...
    def __getitem__(self, index: int | slice) -> "ContrastPair | ContrastSet":
        return replace(self, pairs=self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __iter__(self) -> Iterator[ContrastPair]:
        return iter(self.pairs)

    def save(self, path: str | Path) -> None:
        """Writes JSON lines (`question`, `positive`, `negative`), or raises and leaves what `path` held."""
        path = Path(path).expanduser()
        if path.suffix.lower() in contrast_files.TABLES | contrast_files.SHEETS:
            raise ValueError(f"pairs are saved as .jsonl or .json, got {path.name!r}; a table is written of .frame")
        contrast_files.write_rows(path, self._rows())

    @property
    def frame(self) -> "pandas.DataFrame":
        """One row a pair: `question` (messages as JSON, which is read as such), `positive`, `negative`."""
        import pandas as pd

        rows = self._rows()
        for row in rows:
            if not isinstance(row["question"], str):
                row["question"] = json.dumps(row["question"], ensure_ascii=False)
        return pd.DataFrame(rows)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the pairs, in their order; name and source do not count."""
        return hashlib.sha256(json.dumps(self._rows()).encode()).hexdigest()

    @property
    def provenance_details(self) -> dict[str, str]:
        """What a result's provenance says of the pairs: their hashes, and how many rows were left out."""
        left_out = {"dropped_rows": str(self.dropped)} if self.dropped else {}
        return {PAIR_HASHES: " ".join(self.pair_hashes), **left_out}

    @property
    def pair_hashes(self) -> tuple[str, ...]:
        """Eight hexadecimal digits of each pair's SHA-256: enough to find a pair again, not to prove it.

        An A/B pair has the same digits when its letters are exchanged.
        """
        texts = [
            [
                plain_data(pair.without_options),
                *(sorted(pair.options.values()) if pair.is_ab else (pair.positive, pair.negative)),
            ]
            for pair in self
        ]
        return tuple(hashlib.sha256(json.dumps(text).encode()).hexdigest()[:8] for text in texts)

    def summary(self) -> str:
        """Name, number of pairs, kind and, for A/B pairs, how often each letter is positive."""
        letters = ", ".join(f"{letter} {n}" for letter, n in sorted(self.letter_counts.items()))
        return f"{self.name}: {len(self)} {self.kind} pairs" + (f", positive {letters}" if letters else "")

    def __repr__(self) -> str:
        return f"ContrastSet({self.summary()})"

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"question": plain_data(p.question), "positive": p.positive, "negative": p.negative} for p in self.pairs
        ]


# Editors would show the signature of `__new__`, which takes anything in order to say what is wrong with it.
_OF_INIT = inspect.signature(ContrastSet.__init__)
ContrastSet.__signature__ = _OF_INIT.replace(parameters=[*_OF_INIT.parameters.values()][1:])  # type: ignore[attr-defined]


def load_open_ended(name_or_path: str | Path) -> list[Question]:
    """Open-ended prompts: those of a bundled name; the lines of a .txt; the texts, or questions, of any other file.

    A question may be a list of messages, and then is a `Conversation`.

    Raises:
        ContrastFileError: a `ValueError` that says what in the file does not fit, and where.
    """
    return contrast_files.read_questions(contrast_files.locate(name_or_path, open_ended=True))


def check_contrast_set(pairs: object) -> None:
    """Raises `TypeError` for anything but a `ContrastSet`, `ValueError` for one that was emptied."""
    if isinstance(pairs, ContrastSet):
        if not pairs.pairs:
            raise ValueError("the contrast set is empty: expected at least one pair")
        return
    remedy = "make one with ContrastSet.from_pairs(...) or .load(...)"
    if isinstance(pairs, str):
        remedy = f"make one with ContrastSet.load({pairs!r})"
    elif type(pairs).__name__ == "SteeringVectors":
        remedy = "the pairs come before the vectors"
    elif isinstance(pairs, tuple) and all(isinstance(one, ContrastSet) for one in pairs):
        remedy = "a split gives two, as in train, test = pairs.split(test=0.2)"
    raise TypeError(f"expected a ContrastSet, got {describe(pairs)}: {remedy}")
