"""Chat messages to a prompt with its positions: one question in any format, a conversation through a chat template.

Steering starts where it does everywhere: at the last token of the instruction, of a conversation that of the last turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from caa_lens.arguments import describe
from caa_lens.models.checks import check_model
from caa_lens.prompts.prompt_formats import Prompt, PromptFormat, resolve_format
from caa_lens.prompts.token_spans import find_special_tokens
from caa_lens.prompts.users_words import warn_of_words

TEMPLATE = "chat-template"


def encode_chat(
    model: Any, messages: Sequence[Mapping[str, str]], *, prompt_format: PromptFormat | str | None = None
) -> Prompt:
    """A prompt to answer from, of messages `{"role": ..., "content": ...}` that end with the user's.

    Args:
        messages: perhaps one of the role `system`, then `user` and `assistant` in turns.
        prompt_format: the model's own by default. Turns before the last question take a chat template.

    Raises:
        TypeError: for what is no list of messages with a role and words.
        ValueError: for roles in another order, a format that has no place for earlier turns, or a template that
            drops or changes what a message says; special tokens in a conversation that the format would keep as text.

    Warns:
        TemplateInQuestionWarning, SpecialTokenWarning, StrippedQuestionWarning: as `PromptFormat.encode`, of any turn.
    """
    check_model(model)
    system, turns = _in_order(messages)
    chosen = resolve_format(model, prompt_format)
    if len(turns) == 1:
        return chosen.encode(model.tokenizer, turns[0], system=system)
    if not chosen.name.startswith(TEMPLATE):
        raise ValueError(
            f"got {len(turns)} turns, but the format {chosen.name!r} holds one question and no earlier turns: ask in "
            f"one message, or give prompt_format={TEMPLATE!r} to a model whose tokenizer has a chat template"
        )
    if chosen.special_tokens_as_text and (found := _special_in(model.tokenizer, system, turns)):
        raise ValueError(
            f"the conversation holds {found[0]!r}, which the format would keep as text in one question, and cannot in "
            "several turns: ask in one message, or leave special_tokens_as_text out"
        )
    warn_of_words(chosen, model.tokenizer, turns[::2], turns[1::2], system=system)
    text = _rendered(model.tokenizer, system, turns)
    # The format's own way to tokens and positions, of a text that is already rendered.
    of_last = replace(chosen, render=lambda question, system: text)
    return of_last.encode(model.tokenizer, turns[-1], system=system, warn=False)


def _special_in(tokenizer: Any, system: str | None, turns: Sequence[str]) -> list[str]:
    return [token for words in (system or "", *turns) for token in find_special_tokens(tokenizer, words)]


def _in_order(messages: Any) -> tuple[str | None, list[str]]:
    """The system prompt, and the words of the user and the assistant in turns."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"expected a list of messages with a role and a content, got {describe(messages)}")
    told: list[tuple[str, str]] = []
    for message in messages:
        words = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(words, str):
            raise TypeError(f"expected messages with a role and a content in words, got {describe(message)}")
        told.append((str(message.get("role")), words))
    system = told.pop(0)[1] if told and told[0][0] == "system" else None
    roles = [role for role, _ in told]
    if not roles or len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        given = ", ".join((["system"] if system is not None else []) + roles) or "none"
        raise ValueError(
            f"got messages of {given}: expected perhaps one of system, then user and assistant in turns, the user's "
            "last"
        )
    return system or None, [words for _, words in told]


def _rendered(tokenizer: Any, system: str | None, turns: Sequence[str]) -> str:
    """The template's text of a conversation, which must hold every turn as it is, in order."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja's, the template's own, and what a template can do wrong in Python
        raise ValueError(
            f"the model's chat template failed on {len(turns)} turns ({type(error).__name__}: {error}): ask in one "
            "message"
        ) from None
    at = 0
    for message in messages:
        found = text.find(message["content"], at)
        if found < 0:
            raise ValueError(
                f"the model's chat template drops or changes what the {message['role']} says, "
                f"{message['content'][:60]!r}: give it as the template keeps it, or ask in one message"
            )
        at = found + len(message["content"])
    return text
