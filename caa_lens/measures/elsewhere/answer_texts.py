"""Greedy answers under all conditions at once, and what they look like: length, loops, and whether they are language.

All conditions are rows of one batch: each vector acts on its own rows, and times 0 on the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.measures.elsewhere.changes import RANDOM, Measure, mean_of
from caa_lens.measures.open_ended.text_measures import answer_logp, distinct
from caa_lens.measures.placed_conditions import Condition
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention

TEXT = "text"


def answered_under(
    model: Any,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    n_tokens: int,
    batch_size: int = 48,
    progress: bool = True,
) -> list[list[Prompt]]:
    """The prompts with the answers that the model gives them, `[condition][prompt]`: `divergence.answered` of each.

    Args:
        conditions: of vectors that are added; those that are alike, such as all that do nothing, run once.
        batch_size: rows at once.
    """
    own = list(dict.fromkeys(tuple(one for one in some if one.multiplier != 0) for some in conditions))
    at_once = max(1, batch_size // len(own))
    made: dict[Condition, list[Prompt]] = {some: [] for some in own}
    eos = getattr(model.tokenizer, "eos_token_id", None)
    with tqdm(total=len(prompts), desc="answers", unit="prompt", disable=not progress) as bar:
        for first in range(0, len(prompts), at_once):
            some = list(prompts[first : first + at_once])
            rows = [prompt for _ in own for prompt in some]
            steps = generate_tokens(model, rows, vectors=_by_row(own, len(some)), max_new_tokens=n_tokens)
            tokens = torch.stack(list(steps), dim=1).tolist()
            for i, (prompt, answer) in enumerate(zip(rows, tokens, strict=True)):
                answer = answer[: answer.index(eos) + 1] if eos in answer else answer
                n = len(prompt) + len(answer)
                whole = replace(
                    prompt, tokens=(*prompt.tokens, *answer), answer_start=len(prompt), read=(len(prompt), n)
                )
                made[own[i // len(some)]].append(whole)
            bar.update(len(some))
    return [made[tuple(one for one in some if one.multiplier != 0)] for some in conditions]


def _by_row(conditions: Sequence[Condition], n_prompts: int) -> list[Intervention]:
    """Every condition's interventions, each with its multiplier in its own condition's rows and 0 in the others."""
    found = []
    for i, condition in enumerate(conditions):
        for one in condition:
            assert one.operator == "add"
            multiplier = torch.zeros(len(conditions), n_prompts)
            multiplier[i] = float(one.multiplier)
            found.append(replace(one, multiplier=multiplier.flatten()))
    return found


def words_of(model: Any, prompt: Prompt) -> str:
    """An answer's text."""
    return str(model.tokenizer.decode(prompt.tokens[prompt.answer_start :], skip_special_tokens=True))


def of_answers(model: Any, answers: Sequence[Sequence[Prompt]], *, n_tokens: int, progress: bool) -> list[Measure]:
    """Length, share at the limit, repetition and perplexity of answers `[condition][prompt]`."""
    eos = getattr(model.tokenizer, "eos_token_id", None)
    generated = [[one.tokens[one.answer_start :] for one in some] for some in answers]
    lengths = np.array([[sum(token != eos for token in tokens) for tokens in some] for some in generated], dtype=float)
    loops = np.array([[1 - distinct(words_of(model, one), 4) for one in some] for some in answers])
    # A text of fewer than four words has no 4-grams. Which questions count must not hang on the random directions.
    known = np.isfinite(loops[:RANDOM]).all(axis=0)
    sums, counts = _logp(model, answers, progress)
    about: dict[str, Any] = {"group": TEXT, "of": "neutral questions"}
    n = len(answers[0])
    found = [
        Measure(**about, measure="length", unit="tokens", n_questions=n, value=mean_of(lengths)),
        Measure(
            **about,
            measure="at the limit",
            unit="share",
            n_questions=n,
            value=mean_of((lengths >= n_tokens).astype(float)),
            share=True,
        ),
    ]
    if known.any():
        found.append(
            Measure(
                **about,
                measure="repetition",
                unit="share of 4-grams",
                n_questions=int(known.sum()),
                value=mean_of(np.nan_to_num(loops[:, known])),
            )
        )
    return [*found, Measure(**about, measure="perplexity", unit="", n_questions=n, value=_perplexity(sums, counts))]


def _logp(
    model: Any, answers: Sequence[Sequence[Prompt]], progress: bool
) -> tuple[Float[np.ndarray, "condition prompt"], Float[np.ndarray, "condition prompt"]]:
    """Sums of the unsteered log-probabilities of each answer's tokens, and their numbers; each text runs once."""
    distinct_texts = list({one.tokens: one for some in answers for one in some}.values())
    logp = answer_logp(model, distinct_texts, progress=progress)
    by_tokens: dict[tuple[int, ...], Tensor] = {
        text.tokens: each for text, each in zip(distinct_texts, logp, strict=True)
    }
    found = [[by_tokens[one.tokens].double() for one in some] for some in answers]
    sums = np.array([[float(each.sum()) for each in some] for some in found])
    return sums, np.array([[float(len(each)) for each in some] for some in found])


def _perplexity(
    sums: Float[np.ndarray, "condition prompt"], counts: Float[np.ndarray, "condition prompt"]
) -> Callable[[int, Int[np.ndarray, " question"]], float]:
    return lambda condition, some: float(np.exp(-sums[condition, some].sum() / counts[condition, some].sum()))
