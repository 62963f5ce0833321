"""What methods are fitted on: two sets of prompts, from contrast pairs or from texts, with where they came from."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caa_lens.arguments import describe
from caa_lens.contrast.sets import ContrastSet
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSets:
    """Prompts of two kinds, with their `read` spans set to what a fit reads."""

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]
    name: str
    content_hash: str
    token_position: str
    settings: Mapping[str, str]
    of_pairs: Mapping[str, str] = field(default_factory=dict)

    def provenance(self, model: Any, method: str) -> Provenance:
        """Of what is fitted on them."""
        return Provenance(
            model=str(model.cfg.model_name),
            behavior=self.name,
            method=method,
            prompt_format=self.settings.get("prompt_format", ""),
            token_position=self.token_position,
            n_pairs=len(self.positive),
            dataset_hash=self.content_hash,
            expression=self.name,
            details={
                **self.of_pairs,
                "model_dtype": dtype_name(model),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "transformer_lens": importlib.metadata.version("transformer-lens"),
                "torch": torch.__version__,
            },
        )


def two_sets(
    model: Any,
    data: Any,
    *,
    prompt_format: PromptFormat | str | None = None,
    system: str | None = None,
) -> TwoSets:
    """Pairs, read as `extract` reads them; or `(negative, positive)` texts, read over all tokens but the first.

    Raises:
        TypeError, ValueError: for anything else, an empty set, or a text of one token.
    """
    if isinstance(data, ContrastSet):
        chosen = resolve_format(model, prompt_format)
        pairs = encode_pairs(model, data, chosen, system=system)
        return TwoSets(
            positive=tuple(pair[0] for pair in pairs),
            negative=tuple(pair[1] for pair in pairs),
            name=data.behavior,
            content_hash=data.content_hash,
            token_position="answer letter" if data.kind == "ab" else "mean over the completion",
            settings={"prompt_format": chosen.name, "system": system or "", "data": data.name},
            of_pairs=data.provenance_details,
        )
    if not isinstance(data, tuple) or len(data) != 2 or any(isinstance(some, str) for some in data):
        raise TypeError(f"expected a ContrastSet, or two lists of texts (source, target), got {describe(data)}")
    negative, positive = (tuple(plain_prompt(model, text) for text in some) for some in data)
    if not negative or not positive:
        raise ValueError("no texts given: expected some of both kinds")
    return TwoSets(
        positive=positive,
        negative=negative,
        name="texts",
        content_hash=hash_of([list(some) for some in data]),
        token_position="mean over all tokens but the first",
        settings={"prompt_format": "none", "data": f"{len(negative)} and {len(positive)} texts"},
    )


def plain_prompt(model: Any, text: object, answer_start: int | None = None) -> Prompt:
    """A text without any prompt format, behind BOS where the tokenizer has one; read over all tokens but the first.

    Raises:
        TypeError: without a tokenizer.
        ValueError: for a text of less than one token behind the first.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected texts, which stand in no prompt format, got {describe(text)} among them")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise TypeError("this model has no tokenizer to make tokens of texts: load it from a folder that has one")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    tokens = tuple(ids if bos is None else [bos, *ids])
    if len(tokens) < 2:
        raise ValueError(f"the text {text[:40]!r} has {len(tokens)} tokens, expected two at least")
    n = len(tokens)
    return Prompt(text=text, tokens=tokens, steer_start=n - 1, answer_start=n, read=(1, n), format_name="none")


def hash_of(what: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()[:16]


def check_finite_streams(model: Any, *states: Tensor) -> None:
    """Raises `ValueError` for activations that are not finite."""
    if not all(bool(torch.isfinite(some).all()) for some in states):
        raise ValueError(
            f"activations of {model.cfg.model_name} are not finite in {dtype_name(model)}: load the model in "
            "bfloat16 or float32"
        )
