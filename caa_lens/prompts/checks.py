"""A prompt from the forms a user may write, held against the model that will run it."""

from collections.abc import Mapping
from typing import Any

from caa_lens.arguments import describe
from caa_lens.contrast.messages import is_messages
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat


def as_prompt(
    model: Any, prompt: object, *, prompt_format: PromptFormat | str | None = None, system: str | None = None
) -> Prompt:
    """A prompt, also of a question in words or in messages. Raises `TypeError` for anything else."""
    if isinstance(prompt, Prompt):
        if system is not None and not isinstance(system, str):
            raise TypeError(f"expected a system prompt in words, got {describe(system)}")
        if system or prompt_format is not None:
            what = "a system prompt" if system else "a prompt format"
            raise ValueError(f"got {what} for a Prompt, which is taken as it is: give a question, or leave it out")
        check_prompt(model, prompt)
        return prompt
    if not is_question(prompt):
        raise TypeError(
            f"expected a question in words or in messages, or a Prompt as Prompt.of makes it, got {describe(prompt)}; "
            "several stand in a list"
        )
    return Prompt.of(model, prompt, prompt_format=prompt_format, system=system)  # type: ignore[arg-type]


def is_question(value: object) -> bool:
    """Whether a value is one question: words, or a list of messages."""
    return isinstance(value, str) or is_messages(value)


def listed(prompts: Any) -> list[Any]:
    """One prompt, or a list of several, as a list. A list of messages is one prompt.

    Raises:
        TypeError: for messages among questions, which would be one conversation or several.
        ValueError: for an empty list.
    """
    if not isinstance(prompts, list | tuple):
        return [prompts]
    if is_messages(prompts):
        return [prompts]
    if not prompts:
        raise ValueError("got an empty list: expected a question, a list of messages, or a list of several questions")
    if any(isinstance(one, Mapping) for one in prompts):
        raise TypeError(
            "got messages and questions in one list: a conversation is a list of messages alone, and stands as such in "
            "a list of several"
        )
    return list(prompts)


def check_prompt(model: Any, prompt: object) -> None:
    """Refuses what is no `Prompt`, and one made by hand that the model cannot run.

    Raises:
        TypeError: for anything but a `Prompt`.
        ValueError: for no tokens, a token that the model does not have, or a position outside of the prompt.
    """
    if not isinstance(prompt, Prompt):
        raise TypeError(
            f"expected Prompts, got {describe(prompt)} among them: Prompt.of(model, question) makes one of words, "
            "Prompt.from_tokens(ids) one of token ids"
        )
    n_pos, (first, last) = len(prompt), prompt.read
    if not n_pos:
        raise ValueError("the prompt has no tokens: expected at least one")
    if not (0 <= prompt.steer_start <= n_pos and 0 <= prompt.answer_start <= n_pos and 0 <= first < last <= n_pos):
        raise ValueError(
            f"the prompt has {n_pos} tokens, but steer_start={prompt.steer_start}, answer_start={prompt.answer_start} "
            f"and read={prompt.read}: positions count from 0, and read is a span such as ({n_pos - 1}, {n_pos})"
        )
    lowest, highest = min(prompt.tokens), max(prompt.tokens)
    if lowest < 0 or highest >= model.cfg.d_vocab:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"the prompt has token id {wrong}, but {model.cfg.model_name} has ids 0 to {model.cfg.d_vocab - 1}: make "
            "it with this model's tokenizer"
        )
