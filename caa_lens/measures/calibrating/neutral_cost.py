"""What steering does to neutral prompts that chose nothing, with intervals over prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from caa_lens.measures.divergence import answered, token_kl
from caa_lens.measures.open_ended.text_measures import answer_logp, distinct
from caa_lens.measures.placed_conditions import Condition
from caa_lens.prompts.prompt_formats import Prompt


def shortened(prompts: Sequence[Prompt], which: tuple[int, int]) -> list[Prompt]:
    """The first prompts, with the first tokens of their answers."""
    n_prompts, n_tokens = which
    found = []
    for one in prompts[:n_prompts]:
        stop = min(len(one), one.answer_start + n_tokens)
        found.append(replace(one, tokens=one.tokens[:stop], read=(one.answer_start, stop)))
    return found


def n_answer_tokens(prompts: Sequence[Prompt]) -> int:
    """Of all answers together."""
    return sum(len(one) - one.answer_start for one in prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number over neutral prompts with its 95 % bootstrap interval; None where too few texts have it."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        interval = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NeutralCost:
    """What a multiplier does to neutral prompts that chose nothing.

    Attributes:
        multiplier: 0 is the unsteered model.
        kl_mean, kl_p95: divergence by token of the unsteered model's own answers, in nats.
        perplexity: of the steered model's greedy answers under the unsteered model.
        repetition: of these answers, the share of 4-grams that were there before.
    """

    multiplier: float
    kl_mean: Estimate
    kl_p95: Estimate
    perplexity: Estimate
    repetition: Estimate


def neutral_cost(
    model: Any,
    asked: Sequence[Prompt],
    unsteered: Sequence[Prompt],
    conditions: Sequence[tuple[float, Condition]],
    *,
    n_tokens: int,
    max_tokens: int | None,
    seed: int,
    progress: bool,
) -> tuple[NeutralCost, ...]:
    """The cost of each multiplier, that of 0 first.

    Args:
        asked: the neutral prompts; `unsteered` with the unsteered model's answers.
        conditions: with their multipliers.
    """
    some = [condition for _, condition in conditions]
    kl = token_kl(model, unsteered, some, max_tokens=max_tokens, progress=progress) if some else []
    nothing = [np.zeros(n_answer_tokens([one])) for one in unsteered]
    rows = [(0.0, nothing, list(unsteered))]
    for i, (m, condition) in enumerate(conditions):
        texts = answered(model, asked, condition, max_new_tokens=n_tokens, batch_size=len(asked), progress=progress)
        rows.append((m, [one[i].double().numpy() for one in kl], texts))
    found = []
    for m, own, texts in rows:
        logp = [one.double().numpy() for one in answer_logp(model, texts, batch_size=len(texts), progress=False)]
        answers = [model.tokenizer.decode(one.tokens[one.answer_start :], skip_special_tokens=True) for one in texts]
        loops = [np.array([1 - distinct(answer, 4)]) for answer in answers]
        found.append(
            NeutralCost(
                multiplier=m,
                kl_mean=over_prompts(own, np.mean, seed),
                kl_p95=over_prompts(own, lambda tokens: np.quantile(tokens, 0.95), seed),
                perplexity=over_prompts(logp, lambda tokens: np.exp(-tokens.mean()), seed),
                repetition=over_prompts([one for one in loops if np.isfinite(one).all()], np.mean, seed),
            )
        )
    return tuple(found)


def over_prompts(
    by_prompt: Sequence[Float[np.ndarray, " pos"]], statistic: Callable[[np.ndarray], float], seed: int, n: int = 1000
) -> Estimate:
    """A statistic of all prompts' tokens together; its interval is the percentile bootstrap's, of whole prompts."""
    by_prompt = [one for one in by_prompt if len(one)]
    if not by_prompt:
        return Estimate(value=None, low=None, high=None)
    value = float(statistic(np.concatenate(by_prompt)))
    if len(by_prompt) == 1:
        return Estimate(value=value, low=None, high=None)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(by_prompt), size=(n, len(by_prompt)))
    values = [statistic(np.concatenate([by_prompt[i] for i in some])) for some in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=value, low=float(low), high=float(high))
