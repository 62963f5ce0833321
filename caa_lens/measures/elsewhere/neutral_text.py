"""What steering does to questions that are none of its business: by token of their answers, and to their text.

Two kinds of answers are looked at. The unsteered model's own are the same for every method and strength, so that a
divergence on them is a function of the strength alone. The steered model's own find texts that run away.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from caa_lens.arguments import describe
from caa_lens.contrast.messages import Asked, Question, as_question
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.elsewhere.neutral import CHOOSING, REPORTING
from caa_lens.measures.intervals import bootstrap_interval
from caa_lens.measures.open_ended.text_measures import answer_logp, distinct
from caa_lens.measures.placed_conditions import Condition
from caa_lens.prompts.checks import is_question
from caa_lens.prompts.prompt_formats import Prompt

Check = Callable[[str], float]
OF_TEXT = (
    *("kl_steered", "kl_steered_p95", "perplexity", "repetition"),
    *("checked", "checked_low", "checked_high"),
)


def mean_and_p95(values: torch.Tensor) -> tuple[float, float]:
    """Of some tokens' divergences."""
    return float(values.double().mean()), float(values.double().quantile(0.95))


def of_steered_text(
    model: Any,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    n_tokens: int,
    check: Check | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """The columns `OF_TEXT` of each condition: its answers' divergence, perplexity without steering, repetition."""
    found = []
    for condition in tqdm(conditions, desc="steered text", unit="condition", disable=not progress):
        texts = answered(model, prompts, condition, max_new_tokens=n_tokens, batch_size=len(prompts), progress=False)
        kl = token_kl(model, texts, [condition], weighed_by="steered", progress=False)
        found.append({**_divergence(kl), **_of_texts(model, texts, texts, check)})
    return found


def of_words(
    model: Any,
    prompts: Sequence[Prompt],
    told: Sequence[Prompt],
    unsteered: Sequence[Prompt],
    *,
    n_tokens: int,
    steered_text: bool,
    check: Check | None = None,
) -> dict[str, float]:
    """What an instruction in words does to neutral questions: all columns of costs.

    Args:
        prompts: the questions; `told` with the instruction before them.
        unsteered: the questions with the unsteered model's answers.
    """
    pairs = [with_answer(own, plain) for own, plain in zip(told, unsteered, strict=True)]
    mean, p95 = mean_and_p95(torch.cat(token_kl(model, pairs, [()], against=unsteered, progress=False), dim=1))
    found = {"kl_mean": mean, "kl_p95": p95}
    if steered_text:
        texts = answered(model, told, max_new_tokens=n_tokens, batch_size=len(told), progress=False)
        plain = [with_answer(one, text) for one, text in zip(prompts, texts, strict=True)]
        kl = token_kl(model, texts, [()], against=plain, weighed_by="steered", progress=False)
        found |= {**_divergence(kl), **_of_texts(model, texts, plain, check)}
    return found


def of_unsteered_text(model: Any, unsteered: Sequence[Prompt], check: Check | None = None) -> dict[str, float]:
    """The same columns without any steering."""
    return {"kl_steered": 0.0, "kl_steered_p95": 0.0, **_of_texts(model, unsteered, unsteered, check)}


def with_answer(prompt: Prompt, answer_of: Prompt) -> Prompt:
    """A prompt with the tokens of another prompt's answer behind it."""
    answer = answer_of.tokens[answer_of.answer_start :]
    return Prompt(
        text=prompt.text,
        tokens=(*prompt.tokens, *answer),
        steer_start=prompt.steer_start,
        answer_start=len(prompt),
        read=(len(prompt), len(prompt) + len(answer)),
        format_name=prompt.format_name,
    )


def neutral_questions(
    neutral: tuple[Sequence[Asked], Sequence[Asked]], seen: Sequence[ContrastSet]
) -> tuple[list[Question], list[Question]]:
    """The questions to choose on and to report, once it is certain that they are no others'.

    Of the lists of `elsewhere.neutral` those that are questions of the pairs are left out; of other lists, refused.

    Raises:
        TypeError: for anything but two lists of texts.
        ValueError: for none of a kind, one that is there twice or in both, or that is a question of the pairs.
    """
    if isinstance(neutral, str) or not isinstance(neutral, Sequence) or len(neutral) != 2:
        raise TypeError(f"neutral must be two lists of questions, to choose on and to report, got {describe(neutral)}")
    choosing, reporting = (_without_those_of(_texts(some), some, seen) for some in neutral)
    for what, some in (("to choose on", choosing), ("to report", reporting)):
        if not some:
            raise ValueError(f"no neutral questions {what} given: expected some to choose on, and others to report")
        if len(some) != len(set(map(_plain, some))):
            raise ValueError(f"a neutral question {what} is there twice: give each once")
    if shared := {_plain(one) for one in choosing} & {_plain(one) for one in reporting}:
        raise ValueError(
            f"{len(shared)} neutral questions are both chosen on and reported, {sorted(shared)[0]!r} among them, which "
            "would flatter what is chosen: give others to report"
        )
    if shared := _questions_of(seen) & {_plain(one) for one in (*choosing, *reporting)}:
        raise ValueError(
            f"{len(shared)} neutral questions are questions of the pairs, {sorted(shared)[0]!r} among them, and "
            "methods are fitted on these: give questions that no method sees"
        )
    return choosing, reporting


def distinct_questions(what: str, given: Sequence[Asked], seen: Sequence[ContrastSet]) -> list[Question]:
    """Questions, once it is certain that each is there once and that none is a question of the pairs.

    Of the lists of `elsewhere.neutral` those that are questions of the pairs are left out; of other lists, refused.

    Raises:
        TypeError: for anything but a list of texts.
        ValueError: for one that is there twice, or that is a question of the pairs.
    """
    if not _are_questions(given):
        raise TypeError(f"{what} must be a list of texts, got {describe(given)}")
    asked = _without_those_of([as_question(one) for one in given], given, seen)
    if len(asked) != len(set(map(_plain, asked))):
        raise ValueError(f"one of the {what} is there twice: give each once")
    if shared := _questions_of(seen) & set(map(_plain, asked)):
        raise ValueError(
            f"{len(shared)} of the {what} are questions of the pairs, {sorted(shared)[0]!r} among them: give others"
        )
    return asked


def _without_those_of(questions: list[Question], given: Sequence[Asked], seen: Sequence[ContrastSet]) -> list[Question]:
    if given is not CHOOSING and given is not REPORTING:
        return questions
    taken = _questions_of(seen)
    return [one for one in questions if _plain(one) not in taken]


def _questions_of(seen: Sequence[ContrastSet]) -> set[str]:
    return {_plain(text) for some in seen for pair in some for text in (pair.question, pair.stem)}


def _plain(question: Asked) -> str:
    return " ".join(str(as_question(question)).split()).casefold()


def _are_questions(some: object) -> bool:
    """Whether a value is a list of questions, in words or in messages, and not one of them."""
    listed = isinstance(some, Sequence) and not is_question(some)
    return listed and all(is_question(one) for one in some)  # type: ignore[attr-defined]


def _texts(some: Any) -> list[Question]:
    if not _are_questions(some):
        raise TypeError(f"neutral must be two lists of questions, got {type(some).__name__} among them")
    return [as_question(one) for one in some]


def _divergence(kl: Sequence[torch.Tensor]) -> dict[str, float]:
    mean, p95 = mean_and_p95(torch.cat(list(kl), dim=1))
    return {"kl_steered": mean, "kl_steered_p95": p95}


def _of_texts(
    model: Any, texts: Sequence[Prompt], unsteered: Sequence[Prompt], check: Check | None
) -> dict[str, float]:
    """Of answers; `unsteered` are the same tokens behind the bare question."""
    logp = torch.cat(answer_logp(model, unsteered, progress=False))
    answers = [model.tokenizer.decode(one.tokens[one.answer_start :], skip_special_tokens=True) for one in texts]
    loops = np.array([1 - distinct(answer, 4) for answer in answers])
    found = {
        "perplexity": float((-logp.double().mean()).exp()),
        "repetition": float(np.nanmean(loops)) if np.isfinite(loops).any() else float("nan"),
    }
    if check is not None:
        values = np.array([[float(check(answer))] for answer in answers])
        low, high = bootstrap_interval(values)
        found |= {"checked": float(values.mean()), "checked_low": float(low[0]), "checked_high": float(high[0])}
    return found
