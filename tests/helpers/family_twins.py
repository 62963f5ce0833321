"""What every number is by definition: torch's own hooks on a Hugging Face model that nobody has touched.

Neither TransformerLens nor the package is imported here, there is no cache and no padding, and nothing is known of a
family but where its blocks are. What stands behind the last block (norm, unembedding, caps, scales) is the model's own
code: a state is put in the place of the last block's output, and the model does the rest.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_ONCE = 100  # states that go through the model's tail at a time, as the positions of one text
FAR = 1e4  # a length beside which a norm's epsilon is nothing
NO_CAP = 1e6  # a soft cap that changes nothing


class Step(NamedTuple):
    """What is done to the stream behind one block, from a position on, up to another one if it is said."""

    layer: int
    direction: Tensor
    start: int
    multiplier: float = 1.0
    operator: str = "add"
    stop: int | None = None

    def apply(self, stream: Tensor) -> Tensor:
        """The stream `[batch pos d_model]` after it, in the three operators' own formulas."""
        v, m = self.direction.to(stream.dtype), self.multiplier
        unit = v / v.norm()
        along = (stream @ unit)[..., None]
        changed = {
            "add": stream + m * v,
            "ablate": stream - m * along * unit,
            "set": stream + (m * v.norm() - along) * unit,
        }[self.operator]
        position = torch.arange(stream.shape[1])[:, None]
        here = position >= self.start
        return torch.where(here if self.stop is None else here & (position < self.stop), changed, stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Token ids of a question in the tokenizer's chat template, perhaps with an answer.

    Attributes:
        start: the last token of the instruction, from which on is steered.
        read: the answer's letter, or all tokens of a completion, half-open.
    """

    tokens: list[int]
    start: int
    read: tuple[int, int]


def text_of(tokenizer: Any, question: str, answer: str = "") -> Text:
    """A question and its answer; the answer's letter is what is read of `(A)`."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    before = _ids(tokenizer, asked)
    tokens = _ids(tokenizer, asked + answer)
    assert tokens[: len(before)] == before
    read = (len(before), len(tokens))
    if len(answer) == 3 and answer[0] + answer[2] == "()":
        bracket = len(_ids(tokenizer, asked + "("))
        assert tokens[:bracket] == _ids(tokenizer, asked + "(")
        read = (bracket, bracket + 1)
    return Text(tokens=tokens, start=len(before) - 1, read=read)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Run(NamedTuple):
    """`streams` `[layer pos d_model]` behind each block, after what was done there; `logits` `[pos d_vocab]`."""

    streams: Tensor
    logits: Tensor


class Twin:
    """A Hugging Face model and what follows from its own forward."""

    def __init__(self, hf: Any, tokenizer: Any) -> None:
        self.hf, self.tokenizer = hf, tokenizer
        self._known: dict[tuple, Any] = {}
        config = hf.config
        names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        self.n_layers = next(getattr(config, name) for name in names if hasattr(config, name))
        lists = (module for module in hf.modules() if isinstance(module, torch.nn.ModuleList))
        self.blocks = next(found for found in lists if len(found) == self.n_layers)

    @torch.no_grad()
    def run(self, tokens: Sequence[int], steps: Iterable[Step] = ()) -> Run:
        """One forward of one text by itself."""
        steps, kept = list(steps), {}

        def behind(layer: int, stream: Tensor) -> Tensor:
            for step in steps:
                if step.layer == layer:
                    stream = step.apply(stream)
            kept[layer] = stream[0].clone()
            return stream

        with self._behind_blocks(behind):
            logits = self.hf(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return Run(torch.stack([kept[layer] for layer in range(self.n_layers)]), logits)

    @contextmanager
    def _behind_blocks(self, change: Any) -> Iterator[None]:
        def hook(module: Any, given: Any, out: Any, layer: int) -> Any:
            stream = change(layer, out[0] if isinstance(out, tuple) else out)
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        handles = [
            block.register_forward_hook(lambda m, i, out, layer=layer: hook(m, i, out, layer))
            for layer, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attention_writes(
        self, tokens: Sequence[int], steps: Iterable[Step] = (), *, at: str = "", factor: float = 1.0
    ) -> Tensor:
        """`[layer pos d_model]`: what each block's attention adds to the stream.

        That is `factor` times what comes out of the block's module `at`, by default its module of attention.
        """
        kept: list[Tensor] = []
        handles = []
        for block in self.blocks:
            names = [at] if at else ["self_attn", "attn", "attention", "self_attention"]
            place = next(block.get_submodule(name) for name in names if at or hasattr(block, name))

            def keep(module: Any, given: Any, out: Any) -> None:
                kept.append(factor * (out[0] if isinstance(out, tuple) else out)[0])

            handles.append(place.register_forward_hook(keep))
        try:
            self.run(tokens, steps)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(kept)

    # ---- texts and answers -------------------------------------------------------------------------------------------

    def _once(self, what: str, said: tuple, steps: Iterable[Step], find: Any) -> Any:
        """`find(steps)`, once for the same question and steps; every time where a step is somebody's own function."""
        steps = [one for one in steps if not (isinstance(one, Step) and one.multiplier == 0 and one.operator == "add")]
        if not all(isinstance(one, Step) for one in steps):
            return find(steps)
        key = (what, said, *((*one._replace(direction=None), one.direction.numpy().tobytes()) for one in steps))
        if key not in self._known:
            self._known[key] = find(steps)
        return self._known[key]

    def greedy(self, tokens: Sequence[int], steps: Iterable[Step], n_new: int) -> list[int]:
        """The likeliest next token, `n_new` times, each from the whole text; behind the text's end, its end again."""
        return list(self._once("greedy", (*tokens, n_new), steps, lambda some: self._greedy(tokens, some, n_new)))

    def _greedy(self, tokens: Sequence[int], steps: list[Step], n_new: int) -> list[int]:
        text = list(tokens)
        for n in range(n_new):
            ended = n > 0 and text[-1] == self.tokenizer.eos_token_id
            text.append(text[-1] if ended else int(self.run(text, steps).logits[-1].argmax()))
        return text[len(tokens) :]

    def words(self, tokens: Sequence[int]) -> str:
        """New tokens as text, up to its end."""
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.decode(tokens[: tokens.index(eos)] if eos in tokens else tokens)

    def text(self, question: str, answer: str = "") -> Text:
        return text_of(self.tokenizer, question, answer)

    def sides(self, pair: Any, acts: Iterable[Step] = ()) -> Tensor:
        """Log-probabilities of a pair's positive and negative answer, `[2]`; steered from the instruction's end on.

        Of letters, after the opening bracket and among the two of them; of completions, the mean a token.
        """
        said = (pair.question, pair.positive, pair.negative)
        return self._once("sides", said, acts, lambda some: self._sides(pair, some))

    def _sides(self, pair: Any, acts: list[Step]) -> Tensor:
        answers = (pair.positive, pair.negative)
        texts = [self.text(pair.question, answer) for answer in answers]
        steps = [step._replace(start=texts[0].start) for step in acts]
        if pair.is_ab:
            letters = [text.tokens[text.read[0]] for text in texts]
            logits = self.run(texts[0].tokens[: texts[0].read[0]], steps).logits[-1]
            return logits[letters].log_softmax(-1)
        found = []
        for text in texts:
            logp = self.run(text.tokens, steps).logits.log_softmax(-1)
            found.append(torch.stack([logp[pos - 1, text.tokens[pos]] for pos in range(*text.read)]).mean())
        return torch.stack(found)

    def activations(self, pair: Any) -> Tensor:
        """`[side layer d_model]`: the stream at each answer's letter, or averaged over the completion's tokens."""
        return torch.stack([self._read(pair, answer).mean(1) for answer in (pair.positive, pair.negative)])

    def norms(self, pair: Any) -> Tensor:
        """`[side layer]`: the mean over the tokens that are read of the stream's norm."""
        sides = (pair.positive, pair.negative)
        return torch.stack([self._read(pair, answer).norm(dim=-1).mean(1) for answer in sides])

    def _read(self, pair: Any, answer: str) -> Tensor:
        text = self.text(pair.question, answer)
        return self.run(text.tokens).streams[:, slice(*text.read)]

    def vectors(self, pairs: Sequence[Any]) -> Tensor:
        """Mean differences, `[layer d_model]`."""
        both = torch.stack([self.activations(pair) for pair in pairs]).double()
        return (both[:, 0] - both[:, 1]).mean(0).float()

    # ---- behind the last block ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def tail(self, states: Tensor) -> Tensor:
        """`[state d_vocab]`: the model's logits where these states, `[state d_model]`, are the last block's output."""
        found, last = [], self.n_layers - 1
        for some in states.split(AT_ONCE):
            with self._behind_blocks(lambda layer, stream, some=some: some[None] if layer == last else stream):
                found.append(self.hf(torch.full((1, len(some)), 5), use_cache=False).logits[0])
        return torch.cat(found)

    @property
    def cap(self) -> str | None:
        """The configuration's word for a soft cap of the logits, if it has one."""
        names = ("final_logit_softcapping", "logits_soft_cap")
        return next((name for name in names if getattr(self.hf.config, name, None)), None)

    def uncapped(self, states: Tensor) -> Tensor:
        """`tail` without the soft cap, and without what it gives for no stream at all: W_U (g * norm(x)) and scales."""
        name = self.cap
        own = getattr(self.hf.config, name) if name else None
        if name:
            setattr(self.hf.config, name, NO_CAP)
        try:
            return self.tail(states) - self.tail(torch.zeros_like(states[:1]))
        finally:
            if name:
                setattr(self.hf.config, name, own)

    @property
    def centres(self) -> bool:
        """Whether the final norm takes the mean away first: then a constant stream says nothing."""
        ones = torch.ones(1, self.width)
        other = torch.ones(1, self.width)
        other[0, 0] = -1
        return bool(self.uncapped(FAR * ones).norm() < 1e-3 * self.uncapped(FAR * other).norm())

    @property
    def width(self) -> int:
        return self.hf.get_input_embeddings().weight.shape[1]

    def linear(self, states: Tensor) -> Tensor:
        """W_U (g * x), `[state d_vocab]`: what a state adds to the logits at a norm's scale of 1, and linear in it."""
        size = (states - states.mean(-1, keepdim=True) if self.centres else states).pow(2).mean(-1, keepdim=True).sqrt()
        return self.uncapped(FAR * states / size) * size

    def scales(self, states: Tensor) -> Tensor:
        """`[state]`: what the final norm divides by, its epsilon in it."""
        return self.linear(states).norm(dim=-1) / self.uncapped(states).norm(dim=-1)
