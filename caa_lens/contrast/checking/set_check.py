"""All checks of a contrast set, as one result with a line for each finding."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from caa_lens.contrast.checking.findings import Finding
from caa_lens.contrast.checking.letters import labels_as_completions, letters
from caa_lens.contrast.checking.marks import marks, tokenizer_of, within_tokens, without_question
from caa_lens.contrast.checking.repeats import in_both, repeated
from caa_lens.contrast.checking.sides import lengths, one_sided_words
from caa_lens.contrast.pair import ContrastPair
from caa_lens.plots.findings import finding_bars
from caa_lens.provenance import Provenance
from caa_lens.results import Result

# Said elsewhere while vectors are extracted, or no matter of vectors.
NOT_OF_VECTORS = frozenset({"letters", "special tokens", "both orders"})


class ContrastCheckWarning(UserWarning):
    """Vectors are extracted from pairs in which `ContrastSet.check` finds something."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContrastCheck(Result):
    """What in a contrast set may be wrong, as `ContrastSet.check` finds it.

    Attributes:
        frame: one row a finding: `finding, count, of, message, examples, rows` (numbers of pairs, counted from 1).
        settings: pairs, their number and hash, what they were compared with, the tokenizer.
        provenance: of the `pairs`.
    """

    @property
    def findings(self) -> tuple[str, ...]:
        """What was found, by name; empty where nothing was."""
        return tuple(self.frame["finding"])

    def rows(self, finding: str) -> tuple[int, ...]:
        """The numbers of the pairs that a finding is about, counted from 1."""
        if finding not in self.findings:
            raise ValueError(f"{finding!r} was not found: expected one of {', '.join(self.findings) or '(none)'}")
        found = self.frame.set_index("finding")["rows"]
        return tuple(int(n) for n in str(found[finding]).split(", "))

    def summary(self) -> pd.DataFrame:
        """Count, and what is said, one row a finding."""
        return self.frame.set_index("finding")[["count", "of", "message"]]

    def plot(self) -> go.Figure:
        """How many pairs each finding is about."""
        return finding_bars(self.frame, of=self.settings["pairs"], n_pairs=int(self.settings["n_pairs"]))

    def __repr__(self) -> str:
        n = len(self.frame)
        head = f"{self.settings['pairs']}: {self.settings['n_pairs']} pairs, "
        lines = [head + (f"{n} finding{'s' * (n > 1)}" if n else "nothing found")]
        for row in self.frame.to_dict("records"):
            more = f" [{row['examples']}]" if row["examples"] and row["finding"] != "words" else ""
            lines.append(f"{row['finding']}: {row['message']}{more}")
        return "\n  ".join(lines)


def check_pairs(
    pairs: Sequence[ContrastPair], *, other: Sequence[ContrastPair] = (), other_name: str = "", tokenizer: Any = None
) -> list[Finding]:
    """Every finding, the gravest first."""
    found = [*repeated(pairs), *lengths(pairs), *one_sided_words(pairs), *letters(pairs), *labels_as_completions(pairs)]
    found += [*marks(pairs, tokenizer), *without_question(pairs)]
    if other:
        found += in_both(pairs, other, other_name)
    if tokenizer is not None:
        found += within_tokens(pairs, tokenizer)
    return found


def checked(pairs: Any, *, other: Any = None, model: Any = None) -> ContrastCheck:
    """`ContrastSet.check`."""
    tokenizer = None if model is None else tokenizer_of(model)
    found = check_pairs(
        pairs.pairs,
        other=() if other is None else other.pairs,
        other_name="" if other is None else other.name,
        tokenizer=tokenizer,
    )
    frame = pd.DataFrame(
        [
            {
                "finding": one.finding,
                "count": len(one.rows),
                "of": len(pairs),
                "message": one.message,
                "examples": "; ".join(one.examples),
                "rows": ", ".join(map(str, one.rows)),
            }
            for one in found
        ],
        columns=["finding", "count", "of", "message", "examples", "rows"],
    ).astype({"count": int, "of": int, **dict.fromkeys(["finding", "message", "examples", "rows"], "str")})
    return ContrastCheck(
        frame=frame,
        settings={
            "pairs": pairs.name,
            "n_pairs": str(len(pairs)),
            "pairs_hash": pairs.content_hash,
            "other": "" if other is None else other.name,
            "other_hash": "" if other is None else other.content_hash,
            "tokenizer": "" if tokenizer is None else str(getattr(tokenizer, "name_or_path", "")),
        },
        provenance={
            "pairs": Provenance(
                behavior=pairs.name,
                method="pairs",
                n_pairs=len(pairs),
                dataset_hash=pairs.content_hash,
                details=pairs.provenance_details,
            )
        },
    )


def warn_of_findings(pairs: Any, *, stacklevel: int = 2) -> None:
    """Says in one line that there is something in pairs that vectors would show; `check` tells what."""
    found = [one for one in check_pairs(pairs.pairs) if one.finding not in NOT_OF_VECTORS]
    if found:
        told = ", ".join(f"{one.finding} ({len(one.rows)} of {len(pairs)})" for one in found)
        warnings.warn(
            f"{pairs.name!r} has what its vectors may show in the place of the behavior: {told}. print(pairs.check()) "
            "says more",
            ContrastCheckWarning,
            stacklevel=stacklevel,
        )
