"""What an explorer does, whatever shows it: two texts of one prompt, token by token, their colours, and a lens.

`Session.write` is an iterator of events. Both texts are written in turns, a token each, by `generate_tokens`: each is
the very text that `generate` gives by itself, sampled ones included. Every few tokens, and at the end, both are read
once by `token_similarity`, whose cosines with the chosen layer's vector are the colours. Both are read *without*
steering: what is coloured is what a text says, and not that a vector was added to it. At last comes
`logit_lens(reading="causal")` of the layer, for a multiplier of 1: it is linear in the vector, so a negative multiplier
exchanges its two sides.

One text is written at a time; between two tokens it can be stopped. The text without steering and the lens are kept
while the model is the same: its structure, and what torch counts of changes to its parameters (an edit through `.data`
is not counted, so make a new session after one).
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caa_lens.arguments import as_float, as_seed, check_count, check_list, describe
from caa_lens.interpretation.lens import logit_lens
from caa_lens.interpretation.lens_results import LogitLens
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.models.adapters.choice import adapter_of
from caa_lens.models.checks import check_layers, check_model
from caa_lens.models.structure import structure_of
from caa_lens.prompts.checks import as_prompt
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.provenance import layer_ranges, name_of, one_model
from caa_lens.steering.generation import generate_tokens
from caa_lens.vectors.checks import as_vector_set, check_width
from caa_lens.vectors.interchange import read_vectors
from caa_lens.vectors.steering_vectors import SteeringVector, SteeringVectors

UNSTEERED, STEERED = SIDES = ("unsteered", "steered")
COLOUR_EVERY = 16  # tokens; reading both texts again costs about as much as one or two more tokens of each
LENS_TOKENS = 10  # on each side
LEAST_BOUND = 0.02  # cosines below it stay pale, so that noise alone is not in full colour


class BusyError(RuntimeError):
    """Somebody else's text is being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a session.

    Attributes:
        prompt: a question, which is put into the model's format.
        layer: whose vector is added, and at which it is compared.
        multiplier: how much of it.
        max_new_tokens: of each of the two texts.
        temperature: 0 is greedy.
        seed: of the same samples in both texts.
        lens: whether the layer's lens is read behind the texts; nothing can be stopped meanwhile.
    """

    prompt: str
    layer: int
    multiplier: float | int = 1.0
    max_new_tokens: int = 60
    temperature: float | int = 0.0
    seed: int = 0
    lens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that a session tells while it writes: a `Piece`, `Coloured`, `Finished` or `LensRead`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece(Event):
    """A token more of one text: what it adds to it, "" where a character is not whole yet."""

    side: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coloured(Event):
    """One text as it stands, with the cosine of each token with the layer's vector.

    Attributes:
        side: "unsteered" or "steered".
        layer: at which it was read.
        tokens: what each adds to the text, and its cosine.
        bound: the cosine with full colour, the same for both texts.
    """

    side: str
    layer: int
    tokens: tuple[tuple[str, float], ...]
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """One text is written: it came to its "end", to the "length" that was asked for, or was "stopped"."""

    side: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LensRead(Event):
    """The causal lens of a layer; None while it is being read."""

    layer: int
    lens: LogitLens | None


class Session:
    """A model with vectors, and what may be asked of it.

        session = Session(model, "sentiment.safetensors")
        for event in session.write(Asked(prompt="How was your day?", layer=14, multiplier=-2)):
            ...

    Args:
        vectors: a set, or a file or folder of one.
        multipliers: the least and the greatest that are taken.
        max_chars: the longest prompt, in characters.
        max_new_tokens: the longest text, in tokens, within the model's context.
        controls: random directions beside the lens, see `logit_lens`.
        prompt_format, system: of the prompts; the model's own format by default.

    Raises:
        TypeError: for a model that cannot be steered or has no tokenizer, or for no vectors.
        ValueError: for vectors of another width, layers that the model does not have, vectors of zeros, or limits that
            allow nothing.
    """

    def __init__(
        self,
        model: Any,
        vectors: SteeringVectors | SteeringVector | str | Path,
        *,
        multipliers: Sequence[float | int] = (-4.0, 4.0),
        max_chars: int = 2000,
        max_new_tokens: int = 200,
        controls: int | None = None,
        prompt_format: PromptFormat | str | None = None,
        system: str | None = None,
    ) -> None:
        check_model(model)
        if model.tokenizer is None:
            raise TypeError("this model has no tokenizer: load it from a folder that has tokenizer files")
        self.model = model
        self.vectors = as_vector_set(read_vectors(vectors) if isinstance(vectors, str | Path) else vectors)
        check_width(model, self.vectors)
        check_layers(model, self.vectors.layers)
        norms = dict(zip(self.vectors.layers, self.vectors.norms.tolist(), strict=True))
        if zero := [layer for layer, norm in norms.items() if norm == 0]:
            raise ValueError(
                f"the vectors of the layers {zero} are zero, and steer nothing: leave them out by .at([...])"
            )
        self.multipliers = _range(multipliers)
        self.max_chars = check_count("max_chars", max_chars)
        self.max_new_tokens = min(check_count("max_new_tokens", max_new_tokens), model.cfg.n_ctx)
        self._controls = None if controls is None else check_count("controls", controls, least=0)
        self._format = None if prompt_format is None else resolve_format(model, prompt_format)
        self._system = system
        self._busy = self._stopped = False
        self._lenses: dict[int, tuple[Any, LogitLens]] = {}
        self._unsteered: tuple[Any, list[int]] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return self.vectors.layers

    @property
    def middle_layer(self) -> int:
        """Of the vectors' layers the one nearest to half of the model's depth, where a vector often does most."""
        return min(self.layers, key=lambda layer: abs(layer - self.model.cfg.n_layers / 2))

    @property
    def name(self) -> str:
        return name_of(self.vectors.provenance) or "vectors"

    @property
    def model_name(self) -> str:
        return str(self.model.cfg.model_name)

    @property
    def note(self) -> str:
        """A warning if the vectors are of another model, of the same width; else ""."""
        other = self.vectors.provenance.model
        if one_model((self.model_name, other)) is not None:
            return ""
        return f"The vectors are of {other}, and the model is {self.model_name}: they may mean nothing in it."

    @property
    def busy(self) -> bool:
        """Whether a text is being written."""
        return self._busy

    def stop(self) -> None:
        """End the text that is being written behind its next token; nothing happens if there is none."""
        self._stopped = True

    def check(self, asked: Asked) -> Prompt:
        """The prompt in the model's format.

        Raises:
            ValueError: for an empty prompt or one that is too long, a layer without a vector, or a number outside of
                the session's limits.
        """
        if not isinstance(asked.prompt, str):
            raise TypeError(f"expected a prompt in words, got {describe(asked.prompt)}")
        if not asked.prompt.strip():
            raise ValueError("the prompt is empty: write a question")
        if len(asked.prompt) > self.max_chars:
            raise ValueError(
                f"the prompt has {len(asked.prompt)} characters, at most {self.max_chars} are taken: shorten it"
            )
        if check_count("layer", asked.layer, least=0) not in self.layers:
            raise ValueError(f"there is no vector of layer {asked.layer}: the layers are {layer_ranges(self.layers)}")
        low, high = self.multipliers
        if not low <= as_float("multiplier", asked.multiplier) <= high:
            raise ValueError(f"multiplier must be from {low:g} to {high:g}, got {asked.multiplier:g}")
        if check_count("max_new_tokens", asked.max_new_tokens) > self.max_new_tokens:
            raise ValueError(f"max_new_tokens must be at most {self.max_new_tokens}, got {asked.max_new_tokens}")
        if as_float("temperature", asked.temperature) < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {asked.temperature:g}")
        as_seed(asked.seed)
        return as_prompt(self.model, asked.prompt, prompt_format=self._format, system=self._system)

    def write(self, asked: Asked) -> Generator[Event, None, None]:
        """Both texts piece by piece, with their colours, then the lens of the layer, if wanted and not stopped.

        Raises:
            BusyError: while another text is being written.
            ValueError: as `check`; and if prompt and new tokens do not fit into the context.
        """
        if self._busy:
            raise BusyError("another text is being written: wait for it, or stop it")
        self._busy, self._stopped = True, False
        try:
            yield from self._texts(asked, self.check(asked))
            if asked.lens and not self._stopped:
                if not self._known_lens(asked.layer):
                    yield LensRead(layer=asked.layer, lens=None)
                if not self._stopped:
                    yield LensRead(layer=asked.layer, lens=self.lens(asked.layer))
        finally:
            self._busy = False

    def lens(self, layer: int) -> LogitLens:
        """What the model answers to a layer's vector, `logit_lens(reading="causal")` with the session's controls."""
        state = self._state()
        if (known := self._known_lens(layer)) is not None:
            return known
        found = logit_lens(
            self.model,
            self.vectors,
            layers=[layer],
            k=LENS_TOKENS,
            reading="causal",
            controls=self._controls,
            prompt_format=self._format,
            progress=False,
        )
        self._lenses[layer] = state, found
        return found

    def _known_lens(self, layer: int) -> LogitLens | None:
        state, lens = self._lenses.get(layer, (None, None))
        return lens if state == self._state() else None

    def _texts(self, asked: Asked, prompt: Prompt) -> Iterator[Event]:
        options: dict[str, Any] = {
            "max_new_tokens": asked.max_new_tokens,
            "temperature": float(asked.temperature),
            "seed": asked.seed,
        }
        key = prompt, *options.values(), self._state()
        kept = self._unsteered[1] if self._unsteered is not None and self._unsteered[0] == key else None
        steered = [(self.vectors[asked.layer], asked.multiplier)]
        steps = {
            UNSTEERED: iter(kept) if kept is not None else _ids(generate_tokens(self.model, [prompt], **options)),
            STEERED: _ids(generate_tokens(self.model, [prompt], vectors=steered, **options)),
        }
        texts = {side: _Text(self.model.tokenizer) for side in SIDES}
        n_coloured = 0
        while steps:
            for side in list(steps):
                text = texts[side]
                token = None if self._stopped else next(steps[side], None)
                if token is None or token == text.end:
                    del steps[side]
                    if token is not None:
                        text.tokens.append(token)
                    if (rest := text.flush()) is not None:
                        yield Piece(side=side, text=rest)
                    why = "stopped" if self._stopped else "length" if token is None else "end"
                    if side == UNSTEERED and not self._stopped:
                        self._unsteered = key, list(text.tokens)
                    yield Finished(side=side, why=why)
                    continue
                yield Piece(side=side, text=text.add(token))
            n = sum(len(text.pieces) for text in texts.values())
            if n >= n_coloured + 2 * COLOUR_EVERY or (not steps and n):
                n_coloured = n
                yield from self._colours(asked.layer, prompt, texts)

    def _colours(self, layer: int, prompt: Prompt, texts: "dict[str, _Text]") -> Iterator[Coloured]:
        found = {}
        for side, text in texts.items():
            if text.pieces:
                tokens = (*prompt.tokens, *text.tokens[: len(text.pieces)])
                whole = replace(prompt, tokens=tokens, answer_start=len(prompt))
                similar = token_similarity(self.model, whole, self.vectors, layers=[layer])
                found[side] = similar.frame["cosine"].tolist()[len(prompt) :]
        bound = max([LEAST_BOUND, *(abs(cosine) for cosines in found.values() for cosine in cosines)])
        for side, cosines in found.items():
            coloured = tuple(zip(texts[side].pieces, cosines, strict=True))
            yield Coloured(side=side, layer=layer, tokens=coloured, bound=bound)

    def _state(self) -> tuple:
        """Equal only while the model is the one that it was."""
        modules = [module for _, module in adapter_of(self.model).modules(self.model)]
        parameters = [p for module in modules for p in module._parameters.values() if p is not None]
        versions = tuple((p.data_ptr(), -1 if p.is_inference() else p._version) for p in parameters)
        return structure_of(self.model).signature, versions


class _Text:
    """The tokens of one text, and what each adds to it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.shown = ""

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else half of a character: wait for the rest
        self.pieces.append(text[len(self.shown) :] if whole else "")
        self.shown = text if whole else self.shown
        return self.pieces[-1]

    def flush(self) -> str | None:
        """What is left of a character that never became whole, put to the last token."""
        if not self.pieces:
            return None
        rest = self.tokenizer.decode(self.tokens[: len(self.pieces)])[len(self.shown) :]
        self.pieces[-1] += rest
        self.shown += rest
        return rest or None


def _ids(steps: Iterator[Any]) -> Iterator[int]:
    return (int(step) for step in steps)


def _range(multipliers: Sequence[float | int]) -> tuple[float, float]:
    found = check_list("multipliers", multipliers, float)
    if len(found) != 2 or not found[0] < found[1] or not all(map(_is_finite, found)):
        raise ValueError(
            f"multipliers must be the least and the greatest one, e.g. (-4, 4), got {describe(multipliers)}"
        )
    return found[0], found[1]


def _is_finite(number: float) -> bool:
    return abs(number) < 3.4e38
