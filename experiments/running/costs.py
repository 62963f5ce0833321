"""What a unit takes, counted without a tokenizer or a model: forwards, tokens, steps of generation, requests.

Tokens are estimated from characters: 4 a token, and 12 of a chat format a prompt. Prompts that many conditions share
run once; conditions run from their own layer on, on average half the depth, which is what `depth` says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caa_lens.contrast.sets import ContrastSet

CHARACTERS_A_TOKEN = 4
FORMAT_TOKENS = 12
LETTER_TOKENS = 4
STEP_TOKENS = 20
"""Tokens read at once that take about as long as one step of generation, which waits for the one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a unit takes: forwards (a prompt, or a token that is generated), their tokens, and generated tokens' steps.

    `steps` are forwards of one token a row, waiting for each other: each takes at least the time to read the weights.
    `requests` are a judge's.
    """

    forwards: float = 0
    tokens: float = 0
    steps: float = 0
    requests: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            forwards=self.forwards + other.forwards,
            tokens=self.tokens + other.tokens,
            steps=self.steps + other.steps,
            requests=self.requests + other.requests,
        )

    @property
    def work(self) -> float:
        """The model's work in one number, in tokens: by it units of one kind are held against each other."""
        return self.tokens + STEP_TOKENS * self.steps


def tokens_of(texts: Iterable[str]) -> float:
    """Estimated tokens of some prompts, formats included."""
    return sum(len(text) / CHARACTERS_A_TOKEN + FORMAT_TOKENS for text in texts)


def reading_cost(pairs: "ContrastSet") -> Cost:
    """Both answers of every pair, behind one pass of the question."""
    questions = tokens_of(str(pair.question) for pair in pairs)
    return Cost(forwards=2 * len(pairs), tokens=questions + _answers(pairs))


def scoring_cost(pairs: "ContrastSet", n_conditions: int, *, depth: float = 1.0) -> Cost:
    """All pairs under some conditions: the questions once, the answers once a condition."""
    questions = tokens_of(str(pair.question) for pair in pairs)
    sides = 1 if pairs.kind == "ab" else 2
    return Cost(forwards=sides * len(pairs) * n_conditions, tokens=questions + n_conditions * depth * _answers(pairs))


def generation_cost(prompts: Sequence[str], max_new_tokens: int) -> Cost:
    """One batch of prompts, each answered with all the tokens that are allowed."""
    n_new = len(prompts) * max_new_tokens
    return Cost(forwards=len(prompts) + n_new, tokens=tokens_of(prompts) + n_new, steps=max_new_tokens)


def _answers(pairs: "ContrastSet") -> float:
    if pairs.kind == "ab":
        return len(pairs) * LETTER_TOKENS
    return tokens_of(text for pair in pairs for text in (pair.positive, pair.negative)) - 2 * len(pairs) * (
        FORMAT_TOKENS - 2
    )
