"""Generate steered text: whole, in batches, or as a stream.

The loop feeds the prompt once and then one token at a time, and computes logits of the last position only, in float32.
A plain Llama of TransformerLens keeps keys and values in place; a bridge runs its own forward over Hugging Face's
cache. Where the model has hooks of the caller's own, or is not known to bear this, every step goes through the model's
own `forward` and a warning says so: with the cache of its kind, so that those hooks see the prompt once and then each
token; or over the whole text again, where that cache was not found to give the same numbers (see `plain_runs`; with
hooks, the first token behind the prompt is run both ways), or with `use_cache=False`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from caa_lens.arguments import as_float, as_seed, check_count
from caa_lens.contrast.messages import Asked
from caa_lens.engine import shared_prefix
from caa_lens.engine.edits import Edit, inside_blocks
from caa_lens.engine.overflow import check_finite
from caa_lens.engine.plain_runs import agrees, plain_runs
from caa_lens.engine.positions import of_row
from caa_lens.engine.streams import editing, last_residual
from caa_lens.models.adapters.adapter import Text
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_model
from caa_lens.models.placement import device_of_tokens
from caa_lens.models.structure import structure_of
from caa_lens.models.unembedding import final_logits
from caa_lens.prompts.batches import PromptBatch, left_pad
from caa_lens.prompts.checks import as_prompt, check_prompt, is_question, listed
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat
from caa_lens.steering.generated_text import GeneratedText
from caa_lens.steering.interventions import Steering, as_interventions
from caa_lens.steering.placing import placed
from caa_lens.steering.steered_runs import warn_past_the_end

WHOLE_TEXT = "text is generated through the model's own forward, the whole text for every token,"

Forward = Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch d_model"]]


def generate(
    model: Any,
    prompt: Asked | Prompt | Sequence[Asked | Prompt],
    vectors: Sequence[Steering] = (),
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = 0,
    system: str | None = None,
    prompt_format: PromptFormat | str | None = None,
    use_cache: bool = True,
) -> GeneratedText | list[GeneratedText]:
    """Steered text: a string for one prompt, a list for several prompts or for a multiplier `[batch]`.

    A string knows whether it is `cut`, by `max_new_tokens`; then its `shown` ends with an ellipsis.

    Args:
        prompt: a question (words, or a list of messages, put into the model's format) or a `Prompt`; or several.
        vectors: vectors, `(vector, multiplier)` pairs or `Intervention`s, which act from the instruction's end on
            unless an intervention says another start or positions: `Intervention(vector=v, start=0)` is every token.
            With one prompt, a multiplier tensor `[batch]` gives one text for each of its entries.
        max_new_tokens: the end-of-sequence token ends a text earlier.
        temperature: 0 is greedy (the paper's), else softmax sampling from `seed`; None draws a fresh seed.
        use_cache: False recomputes everything for every token: the same text, slower.

    Raises:
        TypeError: for a model without a tokenizer; `generate_tokens` needs none.
        ValueError: if prompt and new tokens do not fit into the context, a vector does not fit the model, or logits are
            not finite in the model's dtype.
    """
    check_model(model)
    given = listed(prompt)
    prompts = [as_prompt(model, one, prompt_format=prompt_format, system=system) for one in given]
    rows = {len(m) for i in as_interventions(model, vectors) if (m := torch.as_tensor(i.multiplier)).ndim}
    check_count("max_new_tokens", max_new_tokens)
    _check_text(model)
    single = (isinstance(prompt, Prompt) or is_question(prompt)) and not rows
    if len(prompts) == 1 and rows:
        prompts = prompts * max(rows)
    steps = generate_tokens(
        model,
        prompts,
        vectors=vectors,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        use_cache=use_cache,
    )
    tokens = torch.stack(list(steps), dim=1).tolist()
    eos = model.tokenizer.eos_token_id
    texts = [GeneratedText(_decode(model, row), cut=eos not in row) for row in tokens]
    return texts[0] if single else texts


def generate_stream(
    model: Any,
    prompt: Asked | Prompt,
    vectors: Sequence[Steering] = (),
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = 0,
    system: str | None = None,
    prompt_format: PromptFormat | str | None = None,
) -> Iterator[str]:
    """Like `generate` for one prompt, piece by piece as the text grows."""
    check_model(model)
    encoded = as_prompt(model, prompt, prompt_format=prompt_format, system=system)
    _check_text(model)
    tokens: list[int] = []
    text = shown = ""
    for step in generate_tokens(
        model, [encoded], vectors=vectors, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    ):
        tokens.append(int(step))
        text = _decode(model, tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else half of a multi-byte character: wait for the rest
            yield text[len(shown) :]
            shown = text
    if text != shown:  # a character that never became whole
        yield text[len(shown) :]


def generate_tokens(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    vectors: Sequence[Steering] = (),
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = 0,
    use_cache: bool = True,
) -> Iterator[Int[Tensor, " batch"]]:
    """The next token of every row, step by step; a finished row goes on with its end-of-sequence token.

    Needs no tokenizer: `Prompt.from_tokens(ids)` makes a prompt of token ids.
    """
    check_model(model)
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    temperature = as_float("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    seed = as_seed(seed)
    for prompt in prompts:
        check_prompt(model, prompt)
    device = device_of_tokens(model)
    batch = left_pad(prompts, n_ctx=model.cfg.n_ctx, device=device, room=max_new_tokens)
    interventions = placed(model, as_interventions(model, vectors), prompts, batch.padding.tolist())
    edits = [one.edit(batch.steer_start) for one in interventions]
    for edit in edits:
        _check_rows(edit, len(prompts))
    # The end of a prompt is in every run; only what the caller said can lie behind it.
    said = [edit for edit, one in zip(edits, interventions, strict=True) if one.where is not None]
    warn_past_the_end(said, batch.tokens.shape[1] + max_new_tokens - 1, stacklevel=3)
    forward = _chosen_forward(model, batch, edits, max_new_tokens, use_cache)
    eos = getattr(model.tokenizer, "eos_token_id", None)
    # Drawn on the CPU, so that a seed gives the same text on every device.
    generator = torch.Generator().manual_seed(seed)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens = batch.tokens
    for n in range(max_new_tokens):
        with torch.inference_mode():
            logits = final_logits(model, forward(tokens)).to(device)  # [batch d_vocab]
            finite = torch.isfinite(logits.max(-1).values).all()
            new = _choose(torch.where(finite, logits, 0.0), temperature, generator)
            if eos is not None:
                new = torch.where(finished, eos, new)
                finished = finished | (new == eos)
        if bool(~finite | finished.all()):  # the one wait for the device in a token
            check_finite(model, logits.max(-1).values, f"logits of new token {n + 1}")
            yield new
            return
        yield new
        tokens = new[:, None]


def _chosen_forward(
    model: Any, batch: PromptBatch, edits: Sequence[Edit], max_new_tokens: int, use_cache: bool
) -> Forward:
    """The fastest way to run the model that is known to give the model's own numbers."""
    reason = (shared_prefix.unsupported(model) or inside_blocks(edits)) if use_cache else None
    if use_cache and reason is None:
        visible = batch.attention_mask if bool(batch.padding.any()) else None
        room = batch.tokens.shape[1] + max_new_tokens
        text = adapter_of(model).kept_text(model, len(batch.tokens), visible, room)
        if text is not None:
            return _kept(batch, edits, text)
    runs, structure = plain_runs(model), structure_of(model)
    if use_cache and reason is None and not runs.cached:
        reason = f"no key-value cache of {model.cfg.model_name} was found to give its own numbers"
    if reason is not None and not (structure.hooked and structure.only_ours):
        what = "text is generated through the model's own forward," if runs.cached else WHOLE_TEXT
        shared_prefix.warn_unshared(reason, what=what)
    make = _cached if use_cache and runs.cached else _uncached
    if make is _cached and structure.hooked and not structure.only_ours:
        return _cached_if_hooks_bear_it(model, batch, edits)
    # Hooks may be made for the batch, as those of steer with several prompts are: they see it whole.
    if runs.padded or not batch.padding.any() or structure.hooked:
        return make(model, batch, edits)
    forwards = []
    for row, n_padding in enumerate(batch.padding.tolist()):
        alone = PromptBatch(
            tokens=batch.tokens[row : row + 1, n_padding:],
            attention_mask=batch.attention_mask[row : row + 1, n_padding:],
            padding=torch.zeros_like(batch.padding[:1]),
            steer_start=batch.steer_start[row : row + 1] - n_padding,
        )
        forwards.append((n_padding, make(model, alone, _of_row(edits, row, n_padding))))

    def row_by_row(tokens: Tensor) -> Tensor:
        first = tokens.shape == batch.tokens.shape  # the padded prompts, whose padding nobody must see
        rows = [
            forward(tokens[i : i + 1, n_padding if first else 0 :]) for i, (n_padding, forward) in enumerate(forwards)
        ]
        return torch.cat(rows)

    return row_by_row


def _of_row(edits: Sequence[Edit], row: int, n_padding: int) -> list[Edit]:
    """What is done to one row of a padded batch, in the coordinates of its prompt by itself."""
    found = []
    for one in edits:
        multiplier = torch.as_tensor(one.multiplier)
        multiplier = multiplier[row] if multiplier.ndim else multiplier
        found.append(replace(one, multiplier=multiplier, positions=of_row(one.positions, row, n_padding)))
    return found


def _choose(logits: Float[Tensor, "batch d_vocab"], temperature: float, generator: Any) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    # Shifted first, so that a tiny temperature is greedy and not infinity minus infinity.
    shifted = logits.float() - logits.max(-1, keepdim=True).values.float()
    weights = (shifted / max(temperature, torch.finfo(torch.float32).tiny)).softmax(-1).cpu()
    return torch.multinomial(weights, 1, generator=generator)[:, 0].to(logits.device)


def _uncached(model: Any, batch: PromptBatch, edits: Sequence[Edit]) -> Forward:
    """Every step runs the whole text: the slow, obvious way."""
    seen: list[Tensor] = []

    def forward(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        text = torch.cat(seen, dim=1)
        mask = F.pad(batch.attention_mask, (0, text.shape[1] - batch.tokens.shape[1]), value=True)
        return last_residual(model, text, mask, edits=edits)[:, -1]

    return forward


def _cached(model: Any, batch: PromptBatch, edits: Sequence[Edit]) -> Forward:
    """The model's own forward with the KV cache of its kind."""
    adapter = adapter_of(model)
    cache = adapter.new_cache(model, len(batch.tokens))
    behind = 0

    def forward(tokens: Tensor) -> Tensor:
        nonlocal behind
        until = behind + tokens.shape[1]
        mask = F.pad(batch.attention_mask, (0, until - batch.tokens.shape[1]), value=True)
        with editing(model, edits, behind):
            resid = adapter.run(model, tokens, mask, cache=cache)
        behind = until
        return resid[:, -1]

    return forward


def _cached_if_hooks_bear_it(model: Any, batch: PromptBatch, edits: Sequence[Edit]) -> Forward:
    """`_cached`, unless the first token behind the prompt shows that the caller's hooks do something else under it.

    A hook at the last position, say, leaves its edits in the cache, and one at position 0 edits every new token.
    """
    cached, whole = _cached(model, batch, edits), _uncached(model, batch, edits)
    seen: list[Tensor] = []
    chosen: list[Forward] = []

    def forward(tokens: Tensor) -> Tensor:
        if chosen:
            return chosen[0](tokens)
        seen.append(tokens)
        resid = cached(tokens)
        if len(seen) == 1:
            return resid
        expected = whole(torch.cat(seen, dim=1))
        if agrees(model, resid, expected):
            chosen.append(cached)
        else:
            chosen.append(whole)
            shared_prefix.warn_unshared("hooks of your own do something else under a key-value cache", what=WHOLE_TEXT)
        return expected

    return forward


def _kept(batch: PromptBatch, edits: Sequence[Edit], text: Text) -> Forward:
    """A text whose keys and values the kind of model keeps by itself, faster than its own forward does."""
    at_layer: dict[int, list[Edit]] = {}
    for edit in edits:
        at_layer.setdefault(edit.layer, []).append(edit.to(batch.tokens.device))

    def edited(layer: int, resid: Tensor) -> Tensor:
        for edit in at_layer.get(layer, ()):
            resid = edit.apply(resid, text.behind)
        return resid

    return lambda tokens: text.step(tokens, edited)[:, -1]


def _check_rows(edit: Edit, n_rows: int) -> None:
    multiplier = torch.as_tensor(edit.multiplier)
    if multiplier.ndim and len(multiplier) != n_rows:
        raise ValueError(
            f"multiplier has {len(multiplier)} entries for {n_rows} prompts: give one number, or one a prompt"
        )


def _check_text(model: Any) -> None:
    if model.tokenizer is None:
        raise TypeError(
            "this model has no tokenizer to make text of tokens: caa_lens.steering.generate_tokens gives their ids, "
            "of prompts that Prompt.from_tokens(ids) makes; or load it from a folder that has tokenizer files"
        )


def _decode(model: Any, tokens: Sequence[int]) -> str:
    """Text up to the end-of-sequence token."""
    eos = model.tokenizer.eos_token_id
    tokens = list(tokens)
    return model.tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)
