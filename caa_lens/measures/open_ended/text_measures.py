"""What can be said of generated text without a judge: its feelings, its loops, and whether it is still language.

    sentiment     mean over sentences of VADER's compound score, -1 to 1
    distinct_n    distinct n-grams / n-grams
    repetition    1 - distinct_4: the share of 4-grams that were there before
    mean_logp     mean over the answer's tokens of log p(token | prompt, tokens before), in nats, unsteered
    perplexity    exp(-mean_logp)

Steering that is too strong shows as repetition, or as text that the unsteered model finds unlikely. Neither says that
a text is good: a loop has a low perplexity, a joke a high one.

Sources: Hutto and Gilbert, "VADER" (ICWSM 2014), who advise averaging over sentences, as the score of a long text
saturates; Li et al., "A diversity-promoting objective function" (2016) for distinct-n; Welleck et al., "Neural text
generation with unlikelihood training" (2020), whose seq-rep-4 over tokens is `repetition` over words here.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import check_count
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.plain_runs import plain_runs
from caa_lens.engine.streams import last_residual
from caa_lens.extras import needed_for
from caa_lens.measures.open_ended.items import answers_frame
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.models.unembedding import token_logp
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.checks import check_prompt
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.prompts.users_words import warn_of_words

_UNIT = re.compile(r"\w+|[^\w\s]")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")


def measure_texts(
    model: Any,
    texts: Any,
    *,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Every measure of every text: one row a text, in the given order.

    Args:
        model: gives `mean_logp` and `perplexity`, with whatever hooks it has: call this outside of `with steer(...)`.
            None leaves these columns out.
        texts: a frame with `question` and `answer`, whose other columns are passed through; or dicts, or (question,
            answer) pairs.
        prompt_format, system: how a question became a prompt when its answer was generated.
        batch_size: texts at once; the logits take batch x tokens x d_vocab numbers.

    Returns:
        The given columns and `sentiment, repetition, distinct_1, distinct_2`, and with a model `n_tokens, mean_logp,
        perplexity`. NaN where a text is too short to have the measure.

    Raises:
        TypeError: for texts that are not text, or a model without a tokenizer.
        ValueError: for no texts, missing columns, or a text that does not fit into the context.
    """
    batch_size = check_count("batch_size", batch_size)
    if model is not None:
        check_model(model)
        if model.tokenizer is None:
            raise TypeError("this model has no tokenizer: give model=None for the measures that need no model")
    names = ["sentiment", "repetition", "distinct_1", "distinct_2"]
    frame = answers_frame(texts, adds=[*names, "n_tokens", "mean_logp", "perplexity"])
    questions, answers = list(frame["question"]), list(frame["answer"])
    frame["question"] = [str(question) for question in questions]
    frame["sentiment"] = [sentiment(text) for text in answers]
    frame["repetition"] = [1 - distinct(text, 4) for text in answers]
    frame["distinct_1"] = [distinct(text, 1) for text in answers]
    frame["distinct_2"] = [distinct(text, 2) for text in answers]
    if model is None:
        return frame
    fmt = resolve_format(model, prompt_format)
    warn_of_words(fmt, model.tokenizer, questions, answers, system=system)
    prompts = [
        fmt.encode(model.tokenizer, question, answer, system=system, warn=False)
        for question, answer in zip(questions, answers, strict=True)
    ]
    logp = answer_logp(model, prompts, batch_size=batch_size, progress=progress)
    frame["n_tokens"] = [len(of_text) for of_text in logp]
    frame["mean_logp"] = torch.stack([of_text.double().mean() for of_text in logp]).numpy()  # NaN of no tokens
    frame["perplexity"] = (-torch.tensor(frame["mean_logp"].to_numpy())).exp().numpy()
    return frame


def sentiment(text: str) -> float:
    """Mean over sentences of VADER's compound score: -1 negative, 0 neutral, 1 positive. English only; 0 of no text.

    It counts words of a lexicon, with rules for negation and emphasis: it knows neither irony nor what a text is about.
    """
    sentences = [part for part in _BETWEEN_SENTENCES.split(text) if part.strip()]
    scores = [_vader().polarity_scores(sentence)["compound"] for sentence in sentences]
    return sum(scores) / len(scores) if scores else 0.0


@cache
def _vader() -> Any:
    with needed_for("vader, the sentiment of a text"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def distinct(text: str, n: int) -> float:
    """Distinct n-grams / n-grams; NaN of a text of fewer than n units.

    Units are words, in lower case, and single punctuation marks, so that "!!!!" is a loop too. A loop inside a word
    ("hahaha") is one unit and goes unnoticed.
    """
    units = _UNIT.findall(text.lower())
    ngrams = list(zip(*(units[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


@torch.inference_mode()
def answer_logp(
    model: Any, prompts: Sequence[Prompt], *, batch_size: int = 8, progress: bool = True
) -> list[Float[Tensor, " pos"]]:
    """Log-probability of each token of each answer given all before it, in nats; float32 on the CPU.

    Runs the model's own `forward`, with no hooks of ours; text by text where it might not bear padding (`plain_runs`).
    Tokens are those of the text as it stands, which may differ from the ones it was generated as; one that spans the
    prompt's end and the answer's beginning is the answer's. The end-of-sequence token is no part of the text.

    Raises:
        ValueError: if a prompt is longer than the context.
    """
    check_model(model)
    batch_size = check_count("batch_size", batch_size)
    for prompt in prompts:
        check_prompt(model, prompt)
    device = device_of_tokens(model)
    logp = [torch.empty(0) for _ in prompts]
    # Longest first: little padding, and a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    order = [i for i in order if prompts[i].answer_start < len(prompts[i])]
    batch_size = batch_size if plain_runs(model).padded else 1
    with tqdm(total=len(order), desc="perplexity", unit="text", disable=not progress) as bar:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = left_pad([prompts[i] for i in indices], n_ctx=model.cfg.n_ctx, device=device)
            resid = last_residual(model, batch.tokens, batch.attention_mask)
            lengths = [len(prompts[i]) - prompts[i].answer_start for i in indices]
            chosen = []
            for row, n in enumerate(lengths):
                chosen.append(token_logp(model, resid[row, -n - 1 : -1], batch.tokens[row, -n:]))
            for i, of_answer in zip(indices, torch.cat(chosen).cpu().split(lengths), strict=True):
                logp[i] = of_answer
            bar.update(len(indices))
    check_finite(model, torch.cat(logp), "log-probabilities of the answers")
    return logp
