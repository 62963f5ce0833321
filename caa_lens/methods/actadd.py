"""ActAdd: the difference of two short prompts, position by position, added at the front of another prompt.

    A[t] = h+[t] - h-[t]          behind a block, of two texts of equal length with BOS in front
    front        h[t] + strength A[t]      at the first positions of the prompt, in the prefill only
    everywhere   h + strength mean(A[1:])  from the end of the instruction on; what others mean by the name

A[0] is exactly zero, since a causal model computes the same at BOS. A tokenizer without BOS has its end of a sequence
in that place, as in TransformerLens: the first token's stream is like no other's, so both texts have to share it. The
shorter text is made as long as the other with spaces on the right: without, the rows behind its end would be the other
text's whole stream.

Source: arXiv 2308.10248 and its authors' code, which reads and adds at the *input* of block l. That is the output of
block l - 1, so their layer l is `layers=[l - 1]` here. Behind a chat template the first positions are those of the
template: `steer(..., explain_positions=True)` shows which tokens are hit.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from caa_lens.arguments import as_float
from caa_lens.engine.positions import Positions
from caa_lens.methods.data import check_finite_streams, hash_of
from caa_lens.methods.fitted import Fitted
from caa_lens.methods.reading import read_every_token
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.placement import dtype_name
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.provenance import Provenance
from caa_lens.steering.interventions import Intervention


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ActAdd(Fitted):
    """A block of vectors a layer, one for each position of the two texts.

    Attributes:
        block: the difference by position, BOS first.
        texts: the positive and the negative text.
    """

    block: Float[Tensor, "layer pos d_model"]
    texts: tuple[str, str] = field(default=("", ""))

    def interventions(
        self, strength: float | int = 1.0, *, positions: str | Positions = "caa"
    ) -> tuple[Intervention, ...]:
        """The block at the front ("original"), or its mean over the rows behind BOS anywhere else.

        Raises:
            ValueError: if the mean is asked for and there is nothing behind BOS.
        """
        strength = as_float("strength", strength)
        where = self._place(positions, original="front")
        at_front = isinstance(where, str) and where == "front"
        made = []
        for row, layer in enumerate(self.layers):
            direction = self.block[row] if at_front else self.block[row, 1:].mean(0)
            made.append(
                Intervention(
                    parameters={"direction": direction},
                    by_position=frozenset({"direction"}) if at_front else frozenset(),
                    layer=layer,
                    multiplier=strength,
                    positions=where,
                    provenance=self._fitted_at(layer),
                )
            )
        return tuple(made)

    def _in_words(self) -> str:
        return f"{self.block.shape[1]} positions, "


def fit(
    model: Any,
    positive: str | Sequence[int],
    negative: str | Sequence[int],
    *,
    layers: Sequence[int],
    pad: str | int | None = " ",
    progress: bool = True,
    seed: int = 0,
) -> ActAdd:
    """Run both texts, and keep the difference at every position.

    Args:
        positive, negative: short texts, which get BOS in front, or token ids as they are, BOS among them.
        layers: 0-based blocks, behind which the block is added; several add up.
        pad: what makes the shorter text as long, a text of one token or a token's id; None refuses unequal lengths.
        progress, seed: of nothing; every fit takes them.

    Raises:
        ValueError: for texts of unequal length without `pad`, one of a `pad` that is not one token, of no tokens, or
            that do not begin with the same token.
    """
    check_model(model)
    layers = check_layers(model, layers)
    both = [_tokens(model, one) for one in (positive, negative)]
    longest = max(map(len, both))
    if both[0][:1] != both[1][:1]:
        raise ValueError(
            f"the texts begin with tokens {both[0][0]} and {both[1][0]}, expected the same one: the first token's "
            "stream is far larger than any other's, and so would be the difference there; begin both with BOS"
        )
    if len(both[0]) != len(both[1]):
        token = _pad_token(model, pad, both)
        both = [tokens + [token] * (longest - len(tokens)) for tokens in both]
    if longest < 2:
        raise ValueError("the texts have no token behind the first, where all is alike: give texts of two tokens")
    prompts = [Prompt.from_tokens(tokens) for tokens in both]
    above, below = (read_every_token(model, [prompt], layers)[0] for prompt in prompts)
    check_finite_streams(model, above, below)
    texts = tuple(one if isinstance(one, str) else " ".join(map(str, one)) for one in (positive, negative))
    name = f"{texts[0]} - {texts[1]}"
    return ActAdd(
        block=above - below,
        texts=(texts[0], texts[1]),
        layers=layers,
        provenance=Provenance(
            model=str(model.cfg.model_name),
            behavior=name,
            method="ActAdd",
            prompt_format="none",
            token_position="every position of both texts",
            n_pairs=1,
            dataset_hash=hash_of(both),
            expression=name,
            details={
                "model_dtype": dtype_name(model),
                "caa_lens": importlib.metadata.version("caa-lens"),
                "torch": torch.__version__,
            },
        ),
        settings={"pad": repr(pad), "tokens": str(both)},
    )


def _tokens(model: Any, text: str | Sequence[int]) -> list[int]:
    if not isinstance(text, str):
        return list(Prompt.from_tokens(text).tokens)
    if model.tokenizer is None:
        raise TypeError("this model has no tokenizer to make tokens of texts: give token ids")
    ids, tokenizer = model.tokenizer(text, add_special_tokens=False).input_ids, model.tokenizer
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return list(ids) if bos is None else [bos, *ids]


def _pad_token(model: Any, pad: str | int | None, both: Sequence[Sequence[int]]) -> int:
    lengths = f"the texts have {len(both[0])} and {len(both[1])} tokens"
    if pad is None:
        raise ValueError(f"{lengths}, expected as many in both: give pad=' ', or texts of equal length")
    if not isinstance(pad, str):
        return int(pad)
    if model.tokenizer is None:
        raise ValueError(f"{lengths}, and without a tokenizer pad={pad!r} is no token: give a token's id, as pad=0")
    ids = model.tokenizer(pad, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"pad={pad!r} is {len(ids)} tokens of this tokenizer, {ids}, expected one: give a token's id")
    return int(ids[0])
