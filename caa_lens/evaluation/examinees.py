"""A model as an evaluation meets it: loaded by name, steered by a file of vectors or not, asked in chat messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caa_lens.arguments import as_multiplier, check_count, check_list
from caa_lens.evaluation.chats import encode_chat
from caa_lens.models.checks import check_model
from caa_lens.models.loading.load import load_model
from caa_lens.prompts.prompt_formats import PromptFormat, resolve_format
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.interventions import Intervention, Steering, as_interventions
from caa_lens.vectors.interchange import read_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

MAX_NEW_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an examinee said.

    Attributes:
        text: without the end-of-sequence token, and without the stop sequence that ended it.
        n_prompt_tokens: of the messages in the model's format.
        n_new_tokens: that were generated, the end-of-sequence token among them.
        ended_by: "stop": the model's end of sequence, or a stop sequence; "max_tokens": the caller's limit;
            "model_length": the model's context was full before that.
    """

    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    ended_by: Literal["stop", "max_tokens", "model_length"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examinee:
    """A model that answers chat messages, steered the same way every time, or not at all.

    `Examinee.load("demo", vectors="v.safetensors", layer=14, multiplier=2)` makes one; so does a model that is loaded.

    Attributes:
        model: with a tokenizer.
        steering: what is done to it, as `generate` takes it, kept as interventions; () is the unsteered model.
        prompt_format: the model's own by default.
    """

    model: Any
    steering: Sequence[Steering] = ()
    prompt_format: PromptFormat | str | None = None

    def __post_init__(self) -> None:
        check_model(self.model)
        object.__setattr__(self, "steering", tuple(as_interventions(self.model, self.steering)))
        object.__setattr__(self, "prompt_format", resolve_format(self.model, self.prompt_format))

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        vectors: str | Path | None = None,
        layer: int | Sequence[int] | None = None,
        multiplier: float | int | None = None,
        positions: str | None = None,
        prompt_format: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        backend: str | None = None,
    ) -> "Examinee":
        """An examinee from names alone, as a command line gives them.

        Args:
            name: of a model, as `load_model` takes it; dtype, device, backend: as there.
            vectors: a file of steering vectors, as `read_vectors` takes it. Without one, nothing is steered.
            layer: which of the file's layers act; with one layer in the file, it need not be said.
            multiplier: of the vectors, 1 by default.
            positions: a name as `Intervention` takes it, such as "all"; from the instruction's end on by default.

        Raises:
            ValueError: if it is not clear which layer acts, or steering is described without vectors.
            TypeError, FileNotFoundError: as `load_model` and `read_vectors`.
        """
        steering = steering_from(vectors, layer=layer, multiplier=multiplier, positions=positions)
        return cls(
            model=load_model(name, dtype=dtype, device=device, backend=backend),
            steering=steering,
            prompt_format=prompt_format,
        )

    def reply(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """The answer to messages, as `generate` gives it.

        Args:
            messages: as `encode_chat` takes them.
            max_new_tokens: fewer if the context of the model is full before; `ended_by` tells.
            temperature: 0 is greedy, else softmax sampling.
            seed: of sampling; None draws a fresh one for every answer.
            stop: texts that end the answer where the first of them begins.

        Raises:
            ValueError: if the messages alone fill the context, for an empty stop sequence, or as `generate`.
        """
        check_count("max_new_tokens", max_new_tokens)
        if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
            raise ValueError(f"expected a list of stop sequences with at least one character each, got {stop!r}")
        prompt = encode_chat(self.model, messages, prompt_format=self.prompt_format)
        room = self.model.cfg.n_ctx - len(prompt)
        if room < 1:
            raise ValueError(
                f"the messages take {len(prompt)} tokens, but {self.model.cfg.model_name} has a context of "
                f"{self.model.cfg.n_ctx}: shorten them"
            )
        n_most = min(max_new_tokens, room)
        eos = self.model.tokenizer.eos_token_id
        tokens: list[int] = []
        ended_by: Literal["stop", "max_tokens", "model_length"]
        ended_by = "max_tokens" if n_most == max_new_tokens else "model_length"
        for step in generate_tokens(
            self.model, [prompt], vectors=self.steering, max_new_tokens=n_most, temperature=temperature, seed=seed
        ):
            tokens.append(int(step))
            if tokens[-1] == eos:
                ended_by = "stop"
                break
            if stop:
                text = self.model.tokenizer.decode(tokens)
                if found := [at for one in stop if (at := text.find(one)) >= 0]:
                    return Reply(
                        text=text[: min(found)],
                        n_prompt_tokens=len(prompt),
                        n_new_tokens=len(tokens),
                        ended_by="stop",
                    )
        text = self.model.tokenizer.decode(tokens[:-1] if ended_by == "stop" else tokens)
        return Reply(text=text, n_prompt_tokens=len(prompt), n_new_tokens=len(tokens), ended_by=ended_by)

    @property
    def format_name(self) -> str:
        """What the format of its prompts is called."""
        return resolve_format(self.model, self.prompt_format).name

    @property
    def in_words(self) -> str:
        """What is done to the model, for a log."""
        if not self.steering:
            return "unsteered"
        return "; ".join(
            f"{one.in_words}, positions {one.positions or 'from the end of the instruction on'}"
            for one in as_interventions(self.model, self.steering)
        )


def steering_from(
    vectors: str | Path | None,
    *,
    layer: int | Sequence[int] | None = None,
    multiplier: float | int | None = None,
    positions: str | None = None,
) -> tuple[Intervention, ...]:
    """What is done to a model, from a file of vectors; () without one. Arguments and errors as `Examinee.load`."""
    if vectors is None:
        told = {"layer": layer, "multiplier": multiplier, "positions": positions}
        if said := [name for name, value in told.items() if value is not None]:
            raise ValueError(f"got {' and '.join(said)} without vectors: give a file of them, or leave them out")
        return ()
    strength = 1.0 if multiplier is None else as_multiplier(multiplier)
    found = read_vectors(vectors)
    chosen = _chosen(found, vectors, layer)
    return tuple(Intervention(vector=found[one], multiplier=strength, positions=positions) for one in chosen)


def _chosen(found: SteeringVectors, path: str | Path, layer: int | Sequence[int] | None) -> list[int]:
    if layer is None:
        if len(found) > 1:
            raise ValueError(
                f"{path} holds vectors of layers {', '.join(map(str, found.layers))}, which would all act at once: "
                "choose with layer=14, or layer=[13, 14]"
            )
        return list(found.layers)
    wanted = check_list("layer", [layer] if not isinstance(layer, list | tuple) else layer, int)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(found.layers):
        raise ValueError(
            f"got layer={layer!r}, but {path} holds vectors of layers {', '.join(map(str, found.layers))}: choose "
            "among them, each once"
        )
    return wanted
