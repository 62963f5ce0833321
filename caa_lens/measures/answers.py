"""How much a model favours the positive answer of each pair, under many steering conditions at once.

A/B pairs: `p_matching` = p(positive letter) / (p(positive letter) + p(negative letter)) right after the opening
bracket. The full softmax's normaliser cancels in this ratio, so only the letters' logits are computed.

Completions: `margin` = mean log-probability per token of the positive completion minus that of the negative one, in
nats. Source: paper section 4 for A/B; the margin is its counterpart where a small model cannot answer by letter.

A condition is a tuple of interventions; `()` is the unsteered model. Steering starts at the instruction's last token.
The prompt before it runs once for all conditions (see `shared_prefix`). Where the first token of an answer takes in the
end of the prompt (an answer that begins inside a word, or with more line breaks), what is scored are the text's own
tokens from the last one on that the prompt with the answer shares with the prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from caa_lens.arguments import check_count, describe
from caa_lens.contrast.sets import ContrastSet, check_contrast_set
from caa_lens.engine import shared_prefix
from caa_lens.engine.overflow import check_scores, check_steps
from caa_lens.engine.staircase import Staircases
from caa_lens.engine.streams import last_residual
from caa_lens.engine.token_trees import TokenTree
from caa_lens.measures.placed_conditions import Condition, PlacedConditions, check_condition
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_behind, device_of_tokens, dtype_name
from caa_lens.models.unembedding import token_logits, token_logp, token_logps
from caa_lens.prompts.batches import check_fits, n_common
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, encode_answer, encode_letters, resolve_format
from caa_lens.prompts.users_words import warn_of_words
from caa_lens.steering.interventions import Intervention

METRIC_LABEL = {
    "p_matching": "p(answer matching the behavior)",
    "margin": "log-probability margin (nats per token)",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Scores of every pair under every condition.

    Attributes:
        metric: "p_matching" (a probability) or "margin" (nats per token).
        values: `[pair condition]`, float32 on the CPU.
        positive: log-probability of the positive side, `[pair condition]`: of the letter among both letters, or the
            mean per token of the completion.
        negative: likewise for the negative side.
        settings: what the numbers depend on beside the vectors: model, dtype, test set and its hash, prompt format,
            system prompt.
    """

    metric: str
    values: Float[Tensor, "pair condition"]
    positive: Float[Tensor, "pair condition"]
    negative: Float[Tensor, "pair condition"]
    settings: dict[str, str]

    def __repr__(self) -> str:
        n_pairs, n_conditions = self.values.shape
        means = ", ".join(f"{mean:.3g}" for mean in self.values.mean(0)[:8].tolist())
        more = ", ..." if n_conditions > 8 else ""
        return f"Scores({self.metric}, {n_pairs} pairs x {n_conditions} conditions, means {means}{more})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A pair ready to be scored: its branches (one for A/B, two for completions) and the tokens to be predicted.

    Attributes:
        letters: ids of the positive and the negative letter.
        firsts: for each branch, the index of the first token that is scored.
        whole: steering does not begin at one token before both answers' first (an answer may take in the end of the
            prompt), so that the engine, whose suffixes are steered throughout, cannot run the pair.
    """

    branches: tuple[Prompt, ...]
    letters: tuple[int, int] | None
    firsts: tuple[int, ...] = ()
    whole: bool = False


def score_answers(
    model: Any,
    pairs: ContrastSet,
    conditions: Sequence[Condition],
    *,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Scores:
    """Score every pair under every condition.

    Args:
        conditions: tuples of interventions with plain-number multipliers. Steering starts at the instruction's last
            token, unless an intervention names other positions, as in `positions="all"`; where those begin earlier, or
            inside of a block, its condition runs in full, after a `SharedPrefixWarning`. A `start`, or positions in
            numbers, which would be others in every prompt, are refused.
        max_tokens: suffix tokens in flight at once; worked out from the free memory by default.

    Raises:
        ValueError: for an empty set, no conditions, a vector that does not fit the model, or a pair longer than the
            context; a step beyond the model's dtype; or scores that are all NaN.

    Warns:
        NotFiniteWarning: of conditions under which some scores are NaN.
    """
    check_model(model)
    check_contrast_set(pairs)
    if not isinstance(conditions, list | tuple):
        raise TypeError(f"expected a list of conditions, got {describe(conditions)}")
    if not conditions:
        raise ValueError("no conditions given: expected at least one; () is the unsteered model")
    for condition in conditions:
        if not isinstance(condition, tuple | list) or not all(isinstance(step, Intervention) for step in condition):
            raise TypeError(
                "expected tuples of Interventions as conditions, as in [(), (intervention,)], got "
                f"{describe(condition)} among them"
            )
        check_condition(model, condition)
    check_steps(model, [step._at((0, None)) for condition in conditions for step in condition])
    if max_tokens is not None:
        max_tokens = check_count("max_tokens", max_tokens)
    prompt_format = resolve_format(model, prompt_format)
    items = _encode(model, pairs, prompt_format, system)
    reason = shared_prefix.unsupported(model)
    if reason is not None:
        shared_prefix.warn_unshared(reason)
    placed = PlacedConditions(model, conditions, [item.branches for item in items])
    if placed.in_full and reason is None:
        shared_prefix.warn_unshared(placed.in_full)
    logp = torch.empty(len(items), len(conditions), 2)
    whole = [i for i, item in enumerate(items) if item.whole]
    if whole and reason is None:
        shared_prefix.warn_unshared(f"{len(whole)} of {len(items)} answers begin before the first steered token")
    order = sorted(set(range(len(items))) - set(whole), key=lambda i: -len(items[i].branches[0]))
    with (
        tqdm(total=len(items), desc=f"score {pairs.behavior}", unit="pair", disable=not progress) as bar,
        torch.inference_mode(),
    ):
        for i in (*whole, *(order if reason else ())):
            logp[i] = _score_plainly(model, items[i], i, placed, range(len(conditions))).float().cpu()
            bar.update()
        for some in () if reason else placed.together(order):
            for rows, whole_texts in ((some.whole, True), (some.shared, False)):
                staircases = Staircases(rows.edits, device_of_tokens(model))
                how = _Rows.of(model, items, staircases, whole_texts)
                left = some.pairs if rows.columns else []
                while left:
                    n = _batch_size(model, [items[i] for i in left], len(rows.edits), max_tokens, how)
                    indices, left = left[:n], left[n:]
                    batch = [items[i] for i in indices]
                    scored = _score_as_rows(model, batch, staircases, max_tokens, how).float().cpu()
                    logp[torch.tensor(indices)[:, None], torch.tensor(rows.columns)] = scored
                    bar.update(0 if whole_texts else n)
            for i in some.pairs:
                if some.alone:
                    logp[i, some.alone] = _score_plainly(model, items[i], i, placed, some.alone).float().cpu()
                bar.update(0 if some.shared.columns else 1)
    check_scores(model, logp, placed.edits)
    positive, negative = logp.clone().unbind(-1)
    metric, values = ("p_matching", positive.exp()) if pairs.kind == "ab" else ("margin", positive - negative)
    settings = {
        "model": str(model.cfg.model_name),
        "dtype": dtype_name(model),
        "test": pairs.name,
        "test_hash": pairs.content_hash,
        "prompt_format": prompt_format.name,
        "system": system or "",
    }
    return Scores(metric=metric, values=values, positive=positive, negative=negative, settings=settings)


def _encode(model: Any, pairs: ContrastSet, prompt_format: PromptFormat, system: str | None) -> list[_Item]:
    words = [answer for pair in pairs for answer in (pair.positive, pair.negative)]
    warn_of_words(prompt_format, model.tokenizer, [pair.question for pair in pairs], words, system=system)
    items = []
    for pair in pairs:
        letters = None
        branches: tuple[Prompt, ...]
        if pairs.kind == "ab":
            opened, ids = encode_letters(
                prompt_format,
                model.tokenizer,
                pair.question,
                (pair.positive[1], pair.negative[1]),
                system=system,
                warn=False,
            )
            branches, letters = (opened,), (ids[0], ids[1])
        else:
            branches = tuple(
                encode_answer(prompt_format, model.tokenizer, pair.question, answer, system=system, warn=False)
                for answer in (pair.positive, pair.negative)
            )
        for prompt in branches:
            check_fits(prompt, model.cfg.n_ctx)
        if letters:
            # A format may say that steering starts later than at the instruction's last token.
            items.append(_Item(branches=branches, letters=letters, whole=opened.steer_start >= len(opened)))
            continue
        alone = prompt_format.encode(model.tokenizer, pair.question, system=system, warn=False).tokens
        firsts = tuple(min(prompt.answer_start, n_common(alone, prompt.tokens)) for prompt in branches)
        if min(firsts) == 0:
            answer = pair.positive if firsts[0] == 0 else pair.negative
            raise ValueError(
                f"pair {len(items)}: with its answer {answer!r} the text has other tokens from its first on, which "
                "nothing predicts: use a format with BOS, or a longer question"
            )
        start = branches[0].steer_start
        whole = min(firsts) <= start or any(
            prompt.steer_start != start or prompt.tokens[:start] != branches[0].tokens[:start] for prompt in branches
        )
        items.append(_Item(branches=branches, letters=None, firsts=firsts, whole=whole))
    return items


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """How the suffixes of pairs run: what each condition's rows hold.

    Attributes:
        whole: suffixes are whole texts, behind an empty prefix.
        trimmed: without each completion's last token, which predicts nothing.
        trees: both completions of a pair in one row, with their common beginning once.
    """

    whole: bool
    trimmed: bool = False
    trees: bool = False

    @classmethod
    def of(cls, model: Any, items: Sequence[_Item], staircases: Staircases, whole: bool) -> "_Rows":
        alike = staircases.act_alike and items[0].letters is None
        return cls(whole=whole, trimmed=alike, trees=alike and not whole and adapter_of(model).takes_trees)

    def start(self, item: _Item) -> int:
        """Where the suffix begins that each condition runs."""
        return 0 if self.whole else item.branches[0].steer_start

    def suffixes(self, item: _Item) -> list[tuple[int, ...]]:
        start = self.start(item)
        return [prompt.tokens[start : len(prompt) - self.trimmed] for prompt in item.branches]

    def tree(self, item: _Item) -> TokenTree:
        return TokenTree.of(self.suffixes(item))

    def shape(self, item: _Item) -> tuple[int, int]:
        """How many rows a condition has, and how long the longest is."""
        suffixes = self.suffixes(item)
        return (1, len(self.tree(item))) if self.trees else (len(suffixes), max(map(len, suffixes)))


def _batch_size(model: Any, items: Sequence[_Item], n_conditions: int, max_tokens: int | None, rows: _Rows) -> int:
    """How many of the leading items fit into one batch with all their conditions; at least one."""
    length = len(items[0].branches[0])  # the longest: items come sorted
    budget = max_tokens or shared_prefix.token_budget(model, length, rows.shape(items[0])[1])
    most = min(len(items), shared_prefix.prefix_budget(model, length))
    longest = 0
    for n, item in enumerate(items[:most], start=1):
        n_rows, n_pos = rows.shape(item)
        longest = max(longest, n_pos)
        if n * longest * n_rows * n_conditions > budget:
            return max(1, n - 1)
    return most


def _score_as_rows(
    model: Any, items: Sequence[_Item], staircases: Staircases, max_tokens: int | None, rows: _Rows
) -> Float[Tensor, "pair condition side"]:
    """Prefill each prompt once, of whole texts nothing; run the suffixes of as many conditions at a time as fit."""
    starts = [rows.start(item) for item in items]
    prefix = shared_prefix.prefill(
        model,
        [item.branches[0].tokens[:start] for item, start in zip(items, starts, strict=True)],
        model.cfg.n_layers,
    )
    trees = [rows.tree(item) for item in items] if rows.trees else None
    suffixes = [[tree.tokens] for tree in trees] if trees else [rows.suffixes(item) for item in items]
    parents = [tree.parents for tree in trees] if trees else None
    n_pos = max(len(row) for of_item in suffixes for row in of_item)
    budget = max_tokens or shared_prefix.token_budget(model, max(starts), n_pos)
    at_once = max(1, budget // (n_pos * len(items) * len(suffixes[0])))
    logp = torch.empty(len(items), len(staircases.conditions), 2, device=device_of_tokens(model))
    for chunk, stairs in staircases.at_most(at_once):
        resid = shared_prefix.run_suffixes(model, prefix, suffixes, stairs, parents=parents)
        resid = resid.unflatten(1, (len(stairs.groups), -1))  # [pair group branch pos d_model]
        if trees:
            scored = _logp_in_trees(model, resid[:, :, 0], items, rows, trees)
        else:
            scored = (_letter_logp if items[0].letters else _completion_logp)(model, resid, items, rows)
        # It lies where the unembedding does.
        logp[:, chunk] = scored[:, stairs.condition_groups().to(scored.device)].to(logp.device)
    return logp


def _score_plainly(
    model: Any, item: _Item, pair: int, placed: PlacedConditions, columns: Sequence[int]
) -> Float[Tensor, "condition side"]:
    """One forward a condition and branch through the model's own `forward`, unpadded, with the caller's hooks felt."""
    logp = torch.empty(len(columns), 2, device=device_behind(model))
    for row, column in enumerate(columns):
        for side, prompt in enumerate(item.branches):
            tokens = torch.tensor([prompt.tokens], device=device_of_tokens(model))
            resid = last_residual(model, tokens, edits=placed.at(column, pair, side))
            if item.letters:
                logits = token_logits(model, resid[0, -1], torch.tensor(item.letters))
                logp[row] = logits.log_softmax(-1)
            else:
                first = item.firsts[side]
                states, targets = resid[0, first - 1 : -1], prompt.tokens[first:]
                logp[row, side] = token_logp(model, states, torch.tensor(targets)).mean()
    return logp


def _letter_logp(
    model: Any, resid: Float[Tensor, "pair group branch pos d_model"], items: Sequence[_Item], rows: _Rows
) -> Float[Tensor, "pair group side"]:
    """Log-probability of each letter among the two, at the opening bracket."""
    device = resid.device
    last = torch.tensor([rows.shape(item)[1] - 1 for item in items], device=device)
    ids = torch.tensor([item.letters for item in items], device=device)  # [pair side]
    final = resid[torch.arange(len(items), device=device), :, 0, last]  # [pair group d_model]
    return token_logits(model, final, ids[:, None]).log_softmax(-1)


def _completion_logp(
    model: Any, resid: Float[Tensor, "pair group branch pos d_model"], items: Sequence[_Item], rows: _Rows
) -> Float[Tensor, "pair group side"]:
    """Mean log-probability per token of each completion."""
    logp = torch.empty(*resid.shape[:2], 2, device=resid.device)
    for row, item in enumerate(items):
        for side, prompt in enumerate(item.branches):
            first = item.firsts[side] - rows.start(item) - 1  # where the answer's first token is predicted
            targets = torch.tensor(prompt.tokens[item.firsts[side] :], device=resid.device)
            states = resid[row, :, side, first : first + len(targets)]  # [group pos d_model]
            logp[row, :, side] = token_logp(model, states, targets).mean(-1)
    return logp


def _logp_in_trees(
    model: Any,
    resid: Float[Tensor, "pair group pos d_model"],
    items: Sequence[_Item],
    rows: _Rows,
    trees: Sequence[TokenTree],
) -> Float[Tensor, "pair group side"]:
    """`_completion_logp` where both completions of a pair lie in one row: one softmax for what they share."""
    device = device_behind(model)  # where the unembedding lies, and its logits
    logp = torch.empty(*resid.shape[:2], 2, device=device)
    for row, (item, tree) in enumerate(zip(items, trees, strict=True)):
        predicting = [
            place[first - rows.start(item) - 1 :] for place, first in zip(tree.places, item.firsts, strict=True)
        ]
        used = sorted({*predicting[0], *predicting[1]})
        # A token that one side alone has is given some target of the other's; it is not read.
        targets = torch.zeros(2, len(used), dtype=torch.long)
        which = [torch.tensor([used.index(token) for token in some]) for some in predicting]
        for side, prompt in enumerate(item.branches):
            targets[side, which[side]] = torch.tensor(prompt.tokens[item.firsts[side] :])
        moved = torch.cat([torch.tensor(used), *targets, *which]).to(device)  # all in one go
        used_there, first_targets, other_targets, *which = moved.split([len(used)] * 3 + [len(one) for one in which])
        states = resid[row].to(device)[:, used_there]  # [group token d_model]
        found = token_logps(model, states, torch.stack([first_targets, other_targets], dim=-1))
        for side, index in enumerate(which):
            logp[row, :, side] = found[:, index, side].mean(-1)
    return logp
