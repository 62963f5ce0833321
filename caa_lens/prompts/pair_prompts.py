"""The prompts of contrast pairs: a question with either answer behind it."""

from typing import Any

from caa_lens.contrast.sets import ContrastSet
from caa_lens.prompts.batches import check_fits
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, encode_answer
from caa_lens.prompts.users_words import warn_of_words


def encode_pairs(
    model: Any, pairs: ContrastSet, prompt_format: PromptFormat, *, system: str | None = None
) -> list[tuple[Prompt, Prompt]]:
    """Both prompts of every pair, checked against the model's context before anything runs."""
    answers = [answer for pair in pairs for answer in (pair.positive, pair.negative)]
    warn_of_words(prompt_format, model.tokenizer, [pair.question for pair in pairs], answers, system=system)
    encoded = [
        (
            encode_answer(prompt_format, model.tokenizer, pair.question, pair.positive, system=system, warn=False),
            encode_answer(prompt_format, model.tokenizer, pair.question, pair.negative, system=system, warn=False),
        )
        for pair in pairs
    ]
    for prompts in encoded:
        for prompt in prompts:
            check_fits(prompt, model.cfg.n_ctx)
    return encoded
