"""Where a causal reading is taken: which prompts, and at which of their positions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from caa_lens.arguments import describe
from caa_lens.contrast.files import bundled_names
from caa_lens.contrast.messages import Asked
from caa_lens.contrast.sets import ContrastSet, load_open_ended
from caa_lens.engine.stream_responses import ReadPrompt
from caa_lens.prompts.batches import check_fits, check_steered
from caa_lens.prompts.checks import as_prompt, is_question
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.prompts.users_words import warn_of_words
from caa_lens.steering.generation import generate_tokens

PLACES = ("instruction", "answer")
ANSWER_TOKENS = 3
DEFAULT_PLACE = "answer"  # reads best on words and questions that are not reported on: docs/interpretation.md
BUNDLED_PROMPTS = 8


def prompts_to_read(
    model: Any,
    prompts: Sequence[Asked | Prompt] | None,
    *,
    pairs: ContrastSet | None,
    behavior: str,
    place: str,
    prompt_format: PromptFormat | str | None,
) -> list[ReadPrompt]:
    """Prompts with the positions that predict what is read there.

    Args:
        prompts: questions (words or messages) or `Prompt`s; else the distinct questions of the pairs, else the first
            bundled open-ended prompts of the behavior, or of sentiment.
        place: "instruction": the position behind which the answer begins; "answer": the positions that predict the
            tokens of the answer that a `Prompt` has, or of the model's own greedy one, of `ANSWER_TOKENS` at most.

    Raises:
        ValueError: for no prompts, a prompt longer than the context, one that is not steered where it is read, or an
            answer of no tokens.
    """
    if place not in PLACES:
        raise ValueError(f"unknown place {place!r}: expected one of {', '.join(PLACES)}")
    given = _questions(prompts, pairs, behavior)
    asked = [one for one in given if not isinstance(one, Prompt)]
    if asked:
        chosen = resolve_format(model, prompt_format)
        warn_of_words(chosen, model.tokenizer, asked)
        encoded = [
            as_prompt(model, one) if isinstance(one, Prompt) else chosen.encode(model.tokenizer, one, warn=False)
            for one in given
        ]
    else:
        encoded = [as_prompt(model, one) for one in given]
    for one in encoded:
        check_fits(one, model.cfg.n_ctx)
    if place == "instruction":
        found = [ReadPrompt(prompt=one, first=one.answer_start - 1, stop=one.answer_start) for one in encoded]
    else:
        answered = _answered(model, encoded)
        found = [ReadPrompt(prompt=one, first=one.answer_start - 1, stop=len(one) - 1) for one in answered]
    for read in found:
        _check_steered(read)
    return found


def _questions(
    prompts: Sequence[Asked | Prompt] | None, pairs: ContrastSet | None, behavior: str
) -> Sequence[Asked | Prompt]:
    if prompts is not None:
        if isinstance(prompts, Prompt) or is_question(prompts):
            prompts = [prompts]  # type: ignore[list-item]
        if not isinstance(prompts, Sequence):
            raise TypeError(f"expected a list of questions or Prompts, got {describe(prompts)}")
        for one in prompts:
            if not isinstance(one, Prompt) and not is_question(one):
                raise TypeError(f"expected questions or Prompts, got {describe(one)} among them")
        if not prompts:
            raise ValueError("no prompts given: expected at least one question or Prompt, or leave prompts out")
        return prompts
    if pairs is not None:
        return list(dict.fromkeys(pair.question for pair in pairs))
    return load_open_ended(behavior if behavior in bundled_names() else "sentiment")[:BUNDLED_PROMPTS]


def _check_steered(read: ReadPrompt) -> None:
    prompt = read.prompt
    check_steered(prompt)
    if read.first < prompt.steer_start:
        raise ValueError(
            f"the prompt is read from position {read.first} on, but steered only from {prompt.steer_start} on: read it "
            "where it is steered (place='answer'), or use a format with start_offset=0"
        )
    if read.stop <= read.first:
        raise ValueError(
            f"nothing of the prompt that ends {prompt.text[-40:]!r} is read: its answer has no tokens; give one, or "
            "read at place='instruction'"
        )


def _answered(model: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts with an answer as they are, the others with the model's own greedy one."""
    alone = [one for one in prompts if one.answer_start == len(one)]
    for one in alone:
        check_fits(one, model.cfg.n_ctx, ANSWER_TOKENS)
    if not alone:
        return list(prompts)
    rows = torch.stack(list(generate_tokens(model, alone, max_new_tokens=ANSWER_TOKENS)), dim=1).tolist()
    end = getattr(model.tokenizer, "eos_token_id", None)
    answers = iter(rows)
    found = []
    for one in prompts:
        if one.answer_start < len(one):
            found.append(one)
            continue
        answer = next(answers)
        if end in answer:
            answer = answer[: answer.index(end)]
        found.append(replace(one, tokens=(*one.tokens, *answer), answer_start=len(one)))
    return found
