"""The data of a run's behaviors: bundled sets, split here, or the paper's, which come split."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from experiments.settings import RunConfig

if TYPE_CHECKING:
    from caa_lens.contrast import ContrastSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """One behavior's data: pairs to extract from, held-out pairs, open-ended prompts."""

    generate: "ContrastSet"
    test: "ContrastSet"
    open_ended: tuple[str, ...]


@lru_cache(maxsize=64)
def behavior_sets(config: RunConfig, behavior: str) -> Sets:
    """One behavior's sets at the run's sizes. Of the bundled ones, letters are made even after the split."""
    from caa_lens.contrast import ContrastSet, load_open_ended

    if config.data == "paper":
        from caa_lens.paper_data import load_paper_set

        generate, test, open_ended = load_paper_set(behavior)
        test = test.sample(config.n_test, seed=config.seed) if config.n_test < len(test) else test
    else:
        generate, test = ContrastSet.load(behavior).split(test=config.n_test, seed=config.seed)
        open_ended = load_open_ended(behavior)
    if config.n_generate is not None and config.n_generate < len(generate):
        generate = generate.sample(config.n_generate, seed=config.seed)
    if config.data == "bundled" and generate.kind == "ab":
        generate = generate.balance_letters(seed=config.seed)
    return Sets(generate=generate, test=test, open_ended=tuple(open_ended[: config.n_prompts]))
