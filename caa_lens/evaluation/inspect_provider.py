"""A model provider of Inspect, over an `Examinee`.

    inspect eval TASK --model caa-lens/NAME -M vectors=v.safetensors -M layer=14 -M multiplier=1

One question is answered at a time, in a thread, so that Inspect's own loop goes on. Models of one name are shared:
steered at five multipliers, a model is in memory once. What Inspect may ask for and this library does not do (tools,
pictures, nucleus sampling, log-probabilities) is refused and never passed over.
"""

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from caa_lens.evaluation.examinees import MAX_NEW_TOKENS, Examinee, steering_from
from caa_lens.models.loading.load import load_model

MODEL_ARGS = ("vectors", "layer", "multiplier", "positions", "prompt_format", "dtype", "device", "backend")
# What Inspect does itself, or what is about waiting, and changes no answer of this provider's.
_NO_MATTER = {
    *("max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections"),
    *("system_message", "max_tool_output", "parallel_tool_calls", "internal_tools", "cache", "cache_prompt"),
    *("fail_on_refusal", "reasoning_history"),
}
_TAKEN = {"max_tokens", "temperature", "stop_seqs", "seed"}
_SAME_AS_UNSET = {"num_choices": 1, "best_of": 1, "top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


class _Loaded:
    """A model, and the lock of those who ask it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lock = threading.Lock()


_loaded: WeakValueDictionary[tuple[Any, ...], _Loaded] = WeakValueDictionary()  # as long as a provider holds it
_loading = threading.Lock()


class CaaLensAPI(ModelAPI):
    """Inspect's side of an `Examinee`: `caa-lens/demo`, or any name that `load_model` takes."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        **model_args: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        if unknown := sorted(set(model_args) - set(MODEL_ARGS)):
            raise ValueError(
                f"unknown model argument {', '.join(unknown)}: expected -M with one of {', '.join(MODEL_ARGS)}"
            )
        vectors = model_args.pop("vectors", None)
        if vectors is not None and not isinstance(vectors, str | Path):
            # Inspect keeps models by what their arguments look like in JSON, where all vectors look alike.
            raise TypeError(f"expected the path of a file of vectors, got a {type(vectors).__name__}: save them first")
        place = {name: model_args.pop(name, None) for name in ("dtype", "device", "backend")}
        prompt_format = model_args.pop("prompt_format", None)
        steering = steering_from(vectors, **model_args)
        self._file = None if vectors is None else Path(vectors).expanduser()
        self._stamp = _stamp(self._file)
        key = (model_name, *map(str, place.values()))
        with _loading:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _Loaded(load_model(model_name, **place))
        self._shared = found
        self.examinee = Examinee(model=found.model, steering=steering, prompt_format=prompt_format)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer.

        Raises:
            ValueError: for tools, what is no text, options of generation that this library does not have, messages
                that the model's format does not hold, or a file of vectors that has changed since it was read.
        """
        if tools:
            raise ValueError(f"got tools ({tools[0].name}, ...), which models of caa-lens do not call: leave them out")
        check_config(config)
        messages = [{"role": message.role, "content": text_of(message)} for message in input]
        if self._file is not None and _stamp(self._file) not in (self._stamp, None):
            raise ValueError(
                f"{self._file} has changed since it was read, and Inspect keeps models: give get_model(..., "
                "memoize=False), or a file of another name"
            )
        return await anyio.to_thread.run_sync(partial(self._answer, messages, config))

    def _answer(self, messages: list[dict[str, str]], config: GenerateConfig) -> ModelOutput:
        with self._shared.lock:
            began = time.perf_counter()
            reply = self.examinee.reply(
                messages,
                max_new_tokens=MAX_NEW_TOKENS if config.max_tokens is None else config.max_tokens,
                temperature=0.0 if config.temperature is None else config.temperature,
                seed=config.seed,
                stop=config.stop_seqs or (),
            )
            seconds = time.perf_counter() - began
        message = ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reply.ended_by)],
            usage=ModelUsage(
                input_tokens=reply.n_prompt_tokens,
                output_tokens=reply.n_new_tokens,
                total_tokens=reply.n_prompt_tokens + reply.n_new_tokens,
            ),
            time=seconds,
            metadata={"steering": self.examinee.in_words, "prompt_format": self.examinee.format_name},
        )

    async def count_text_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(self.examinee.model.tokenizer(text)["input_ids"])

    def max_tokens(self) -> int | None:
        """Of an answer, if nobody says more or less."""
        return MAX_NEW_TOKENS

    def max_connections(self) -> int:
        """One answer at a time."""
        return 1

    def connection_key(self) -> str:
        """Models of one name share their one place."""
        return self.model_name

    def collapse_user_messages(self) -> bool:
        """Of consecutive messages Inspect makes one, as chat templates want them."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """As `collapse_user_messages`."""
        return True

    def collapse_system_messages(self) -> bool:
        """As `collapse_user_messages`."""
        return True


def check_config(config: GenerateConfig) -> None:
    """Raises `ValueError` for an option of generation that would be passed over."""
    given = {
        name: value for name, value in config.model_dump(exclude_none=True).items() if value not in (False, [], {})
    }
    others = [
        name
        for name, value in given.items()
        if name not in _NO_MATTER | _TAKEN and _SAME_AS_UNSET.get(name, ...) != value
    ]
    if others:
        raise ValueError(
            f"models of caa-lens do not take {', '.join(others)}: leave it out; what they take is "
            f"{', '.join(sorted(_TAKEN))}"
        )


def text_of(message: ChatMessage) -> str:
    """What a message says. Raises `ValueError` for anything but text."""
    if isinstance(message.content, str):
        return message.content
    kinds = [part.type for part in message.content]
    if others := sorted(set(kinds) - {"text"}):
        raise ValueError(
            f"a message of the {message.role} holds {', '.join(others)}: models of caa-lens take text only"
        )
    return "\n".join(_texts(message.content))


def _texts(parts: Sequence[Any]) -> list[str]:
    return [part.text for part in parts]


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """What tells that a file was written again; None if there is none, and for a folder."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size
