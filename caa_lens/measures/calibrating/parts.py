"""Which pairs choose and which report, and which multipliers come with their negatives."""

from collections.abc import Sequence
from dataclasses import replace

from caa_lens.arguments import check_list
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.measures.honest_choice import MIN_QUESTIONS

MIN_PART = 16


def magnitudes_of(multipliers: Sequence[float | int]) -> list[float]:
    """Those above 0, ascending, once each has its negative."""
    every = check_list("multipliers", multipliers, float)
    if len(set(every)) != len(every):
        raise ValueError(f"multipliers must differ, got {every}")
    given = set(every) - {0.0}
    if not given or any(-m not in given for m in given):
        alone = sorted(m for m in given if -m not in given)
        raise ValueError(
            f"each multiplier must come with its negative, got {sorted(every)}"
            + (f" without {-alone[0]:g}" if alone else "")
            + ": give e.g. [-2, -1, 1, 2]"
        )
    return sorted(m for m in given if m > 0)


def parts_of(
    pairs: ContrastSet, test: float | int | ContrastSet, seed: int
) -> tuple[ContrastSet, int, ContrastSet | None]:
    """All questions, those that choose first; how many choose; and those that report, or None where all do both."""
    check_contrast_set(pairs)
    hashes = [*pairs.pair_hashes, *(test.pair_hashes if isinstance(test, ContrastSet) else ())]
    if len(set(hashes)) < len(hashes):
        raise ValueError(
            f"{len(hashes) - len(set(hashes))} pairs are there twice, so that one could choose and "
            "report: give each once"
        )
    if isinstance(test, ContrastSet):
        check_contrast_set(test)
        if test.kind != pairs.kind:
            raise ValueError(f"got {pairs.kind} to choose on and {test.kind} to report: give both of one kind")
        validation, tested = pairs, test
    else:
        if len(pairs) < MIN_QUESTIONS:
            raise ValueError(
                f"got {len(pairs)} pairs: of fewer than {MIN_QUESTIONS} nothing can be chosen honestly; give "
                "more, or name layer and multiplier beforehand and sweep them"
            )
        validation, tested = pairs.split(test=test, seed=seed)
        if isinstance(test, float) and min(len(validation), len(tested)) < MIN_PART:
            return pairs, len(pairs), None
    for what, some in (("choose", validation), ("report", tested)):
        if len(some) < MIN_QUESTIONS:
            raise ValueError(f"{len(some)} pairs would {what}, expected at least {MIN_QUESTIONS}: give more pairs")
    return replace(validation, pairs=validation.pairs + tested.pairs), len(validation), tested
