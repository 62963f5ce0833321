"""The data of a run's behaviors: bundled sets, split here, or the paper's, which come split.

A plan can be made before the paper's sets are fetched: blank questions stand in for them, as many as the paper says and
about as long (the mean of the human-written evals, and of the authors' sets that we have read).
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from experiments.running.settings import RunConfig

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """One behavior's data: pairs to extract from, to choose the layer on, and to report; open-ended prompts.

    Attributes:
        validation: None where the settings name the layer, so that nothing is chosen.
    """

    generate: "ContrastSet"
    validation: "ContrastSet | None"
    test: "ContrastSet"
    open_ended: tuple[str, ...]


LETTERS = ("(A)", "(B)")
TYPICAL_CHARACTERS = {"sycophancy": 615, "truthfulqa": 183, "mmlu": 400}
ELSEWHERE_CHARACTERS = 240
N_OPEN_ENDED = 50
N_TRUTHFUL_QA = 817


def missing_sets(config: RunConfig) -> tuple[str, ...]:
    """The paper's sets that such a run uses and that have not been fetched."""
    from caa_lens.paper.numbers import BEHAVIORS
    from caa_lens.paper.questions import data_folder
    from caa_lens.paper.sources import QUESTIONS

    if config.data != "paper":
        return ()
    folder = data_folder()
    of_behaviors = [b for b in config.behaviors if b in BEHAVIORS and not (folder / b / "test.jsonl").is_file()]
    return (*of_behaviors, *(name for name in QUESTIONS if not (folder / name / "questions.jsonl").is_file()))


def stand_in(name: str, n: int) -> "ContrastSet":
    """So many blank A/B questions of about the length of a set's."""
    from caa_lens.contrast.sets import ContrastSet

    length = TYPICAL_CHARACTERS.get(name, ELSEWHERE_CHARACTERS)
    questions = [f"{i}".ljust(length, ".") + "\n\nChoices:\n (A) Yes\n (B) No" for i in range(n)]
    return ContrastSet.from_pairs([(q, *LETTERS[:: 1 - 2 * (i % 2)]) for i, q in enumerate(questions)], name=name)


def warn_of_pairs_in_both(behavior: str, generate: "ContrastSet", test: "ContrastSet") -> None:
    """Warns of held-out pairs that vectors are extracted from, letters exchanged or not."""
    from caa_lens.measures.training_pairs import TrainingPairsWarning

    if n_both := len({*generate.pair_hashes} & {*test.pair_hashes}):
        warnings.warn(
            f"{behavior}: {n_both} of the {len(test)} held-out pairs are among those that vectors are extracted from, "
            "which flatters them: take them out of one of the files",
            TrainingPairsWarning,
            stacklevel=3,
        )


def set_apart(pool: "ContrastSet", test: "ContrastSet", config: RunConfig) -> "tuple[ContrastSet, ContrastSet | None]":
    """The pairs that vectors are made from, and of the others the validation pairs, if a layer is to be chosen.

    Raises:
        ValueError: if no pair would be left for one of them.
    """
    from dataclasses import replace

    n_validation = config.n_validation if config.layer is None else 0
    n_left = len(pool) - n_validation
    if n_left < 1:
        raise ValueError(
            f"{pool.name} has {len(pool)} pairs beside the held-out ones, expected more than the {n_validation} that "
            "choose the layer: name a layer with --layer, or take fewer with --n-validation"
        )
    n_generate = n_left if config.n_generate is None else min(n_left, config.n_generate)
    generate = pool.sample(n_generate, seed=config.seed) if n_generate < len(pool) else pool
    if not n_validation:
        return generate, None
    used = {*generate.pair_hashes, *test.pair_hashes}
    others = [pair for pair, digest in zip(pool, pool.pair_hashes, strict=True) if digest not in used]
    if not others:
        raise ValueError(
            f"every pair of {pool.name} is extracted from or held out, expected some to choose on: name a layer"
        )
    rest = replace(pool, pairs=tuple(others))
    return generate, rest.sample(min(n_validation, len(rest)), seed=config.seed)


@lru_cache(maxsize=64)
def behavior_sets(config: RunConfig, behavior: str) -> Sets:
    """One behavior's sets at the run's sizes. Of the bundled ones, letters are made even after the split.

    Warns:
        TrainingPairsWarning: if held-out pairs are among those to extract from (the paper's sets come split).
    """
    from caa_lens.contrast.sets import ContrastSet, load_open_ended

    if config.data == "paper":
        from caa_lens.paper.questions import load_paper_set, published_size

        if behavior in config.stand_ins:
            generate, test = (
                stand_in(behavior, published_size(behavior, split) or 0) for split in ("generate", "test")
            )
            open_ended = [f"{i}".ljust(ELSEWHERE_CHARACTERS, ".") for i in range(N_OPEN_ENDED)]
        else:
            generate, test, open_ended = load_paper_set(behavior)
        test = test.sample(config.n_test, seed=config.seed) if config.n_test < len(test) else test
    else:
        generate, test = ContrastSet.load(behavior).split(test=config.n_test, seed=config.seed)
        open_ended = load_open_ended(behavior)
    generate, validation = set_apart(generate, test, config)
    if config.data == "bundled" and generate.kind == "ab":
        generate = generate.balance_letters(seed=config.seed)
    if behavior not in config.stand_ins:
        warn_of_pairs_in_both(behavior, generate, test)
    return Sets(generate=generate, validation=validation, test=test, open_ended=tuple(open_ended[: config.n_prompts]))
