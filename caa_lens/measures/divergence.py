"""How much steering changes what the model says elsewhere: Kullback-Leibler divergence by token, in nats.

    kl_t = sum over tokens w of p(w) (log p(w) - log q(w))

at each token t of an answer that is given: p weighs the differences. On the unsteered model's own answer p is the
unsteered distribution and q the steered one; on a steered answer it is the other way round. So each is an expectation
over texts that the first of the two writes, and the sum over the tokens of a sampled text estimates the divergence
between whole answers.

On neutral prompts that no method saw it is what steering costs, in the same unit for every method.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import check_count
from caa_lens.engine import shared_prefix
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.staircase import Staircase, Staircases
from caa_lens.engine.streams import last_residual
from caa_lens.measures.placed_conditions import Condition, PlacedConditions, check_condition
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.checks import check_prompt
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens

WEIGHED_BY = ("unsteered", "steered")


@torch.inference_mode()
def token_kl(
    model: Any,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition],
    *,
    weighed_by: str = "unsteered",
    against: Sequence[Prompt] | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> list[Float[Tensor, "condition pos"]]:
    """The divergence at each token of each prompt's answer under each condition, in nats; float32 on the CPU.

    Args:
        prompts: with answers, as `answered` makes them.
        conditions: as `score_answers` takes them; those that leave the prompt's beginning alone share it.
        weighed_by: whose distribution weighs the differences, "unsteered" or "steered".
        against: prompts with the same answers, which the unsteered model is given in the place of `prompts`; so what a
            system prompt changes is measured, with the one condition `()`.
        max_tokens: suffix tokens in flight at once; worked out from the free memory by default.

    Raises:
        ValueError: for no prompts or conditions, a prompt without an answer, or answers that are not the same.
    """
    check_model(model)
    if not prompts or not conditions:
        raise ValueError(f"no {'conditions' if prompts else 'prompts'} given: expected at least one")
    if weighed_by not in WEIGHED_BY:
        raise ValueError(f"unknown weighed_by={weighed_by!r}: expected one of {', '.join(WEIGHED_BY)}")
    for condition in conditions:
        check_condition(model, condition)
    max_tokens = None if max_tokens is None else check_count("max_tokens", max_tokens)
    plain = list(prompts if against is None else against)
    for one, other in zip(prompts, plain, strict=True):
        for prompt in (one, other):
            check_prompt(model, prompt)
        if not _answer(one):
            raise ValueError(f"the prompt {one.text[:40]!r} has no answer, whose tokens would be compared")
        if _answer(one) != _answer(other):
            raise ValueError(f"the prompts of {one.text[:40]!r} have other answers: give the same tokens to both")
    reason = shared_prefix.unsupported(model)
    if reason is not None:
        shared_prefix.warn_unshared(reason)
    placed = PlacedConditions(model, conditions, [(prompt,) for prompt in prompts])
    if placed.in_full and reason is None:
        shared_prefix.warn_unshared(placed.in_full)
    found = [torch.empty(len(conditions), len(_answer(prompt))) for prompt in prompts]
    # Where steering starts behind the end of the prompt, the first token of the answer is predicted before it.
    whole = {i for i, one in enumerate(prompts) if reason or one.steer_start >= one.answer_start}
    with tqdm(total=len(prompts), desc="KL of neutral prompts", unit="prompt", disable=not progress) as bar:
        for i in sorted(whole):
            reference = _reference(model, plain[i])
            for column in range(len(conditions)):
                found[i][column] = _kl(_in_full(model, prompts[i], placed, i, column), reference, weighed_by)
            bar.update()
        for some in placed.together(sorted(set(range(len(prompts))) - whole)):
            ways = [
                (rows.columns, Staircases(rows.edits, device_of_tokens(model)), from_start)
                for rows, from_start in ((some.shared, False), (some.whole, True))
                if rows.columns
            ]
            for i in some.pairs:
                prompt, start = prompts[i], prompts[i].steer_start
                prefix = shared_prefix.prefill(model, [prompt.tokens[:start]])
                if plain[i] is prompt:  # by the same code, so that doing nothing is told from nothing
                    nothing = Staircase([()], device_of_tokens(model))
                    resid = shared_prefix.run_suffixes(model, prefix, [[prompt.tokens[start:]]], nothing)[0, 0]
                    read = slice(prompt.answer_start - 1 - start, -1)
                    reference = final_logits(model, resid[read]).log_softmax(-1)
                else:
                    reference = _reference(model, plain[i])
                for columns, staircases, from_start in ways:
                    first = 0 if from_start else start
                    behind = shared_prefix.prefill(model, [()]) if from_start else prefix
                    n_pos, read = len(prompt) - first, slice(prompt.answer_start - 1 - first, -1)
                    budget = max_tokens or shared_prefix.token_budget(model, first, n_pos)
                    told = torch.empty(len(columns), found[i].shape[1], device=reference.device)
                    for chunk, stairs in staircases.at_most(max(1, budget // n_pos)):
                        resid = shared_prefix.run_suffixes(model, behind, [[prompt.tokens[first:]]], stairs)[0]
                        of_group = [
                            _kl(final_logits(model, one[read]).log_softmax(-1), reference, weighed_by) for one in resid
                        ]
                        groups = stairs.condition_groups().to(told.device)
                        told[chunk.to(told.device)] = torch.stack(of_group).to(told.dtype)[groups]
                    found[i][columns] = told.cpu()
                for column in some.alone:
                    found[i][column] = _kl(_in_full(model, prompt, placed, i, column), reference, weighed_by)
                bar.update()
    check_finite(model, torch.cat([one.flatten() for one in found]), "divergences of neutral prompts")
    return found


def answered(
    model: Any,
    prompts: Sequence[Prompt],
    condition: Condition = (),
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Prompt]:
    """The prompts with the greedy answer that the model gives them under a condition, as tokens.

    The end-of-sequence token is the last of an answer that has one.
    """
    check_model(model)
    n_new, batch_size = check_count("max_new_tokens", max_new_tokens), check_count("batch_size", batch_size)
    eos = getattr(model.tokenizer, "eos_token_id", None)
    made = []
    with tqdm(total=len(prompts), desc="answers", unit="prompt", disable=not progress) as bar:
        for first in range(0, len(prompts), batch_size):
            some = list(prompts[first : first + batch_size])
            steps = generate_tokens(model, some, vectors=list(condition), max_new_tokens=n_new)
            rows = torch.stack(list(steps), dim=1).tolist()
            for prompt, row in zip(some, rows, strict=True):
                answer = row[: row.index(eos) + 1] if eos in row else row
                n = len(prompt) + len(answer)
                tokens = (*prompt.tokens, *answer)
                made.append(replace(prompt, tokens=tokens, answer_start=len(prompt), read=(len(prompt), n)))
            bar.update(len(some))
    return made


def _answer(prompt: Prompt) -> tuple[int, ...]:
    return prompt.tokens[prompt.answer_start :]


def _reference(model: Any, prompt: Prompt) -> Float[Tensor, "pos d_vocab"]:
    tokens = torch.tensor([prompt.tokens], device=device_of_tokens(model))
    resid = last_residual(model, tokens)[0, prompt.answer_start - 1 : -1]
    return final_logits(model, resid).log_softmax(-1)


def _in_full(model: Any, prompt: Prompt, placed: PlacedConditions, i: int, column: int) -> Float[Tensor, "pos d_vocab"]:
    tokens = torch.tensor([prompt.tokens], device=device_of_tokens(model))
    resid = last_residual(model, tokens, edits=placed.at(column, i, 0))[0, prompt.answer_start - 1 : -1]
    return final_logits(model, resid).log_softmax(-1)


def _kl(
    steered: Float[Tensor, "pos d_vocab"], plain: Float[Tensor, "pos d_vocab"], weighed_by: str
) -> Float[Tensor, " pos"]:
    p, q = (plain, steered) if weighed_by == "unsteered" else (steered, plain)
    # Rounding may leave a tiny negative number where both are the same.
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)
