"""Messages on their way into a prompt: put together with a system prompt, and found again in the text they became."""

from collections.abc import Callable, Sequence
from typing import Any

from caa_lens.contrast.messages import Asked, Conversation, Message, as_question
from caa_lens.prompts.users_words import check_text

Turn = tuple[str, int, int]
"""A role, and the half-open span of what it says: of characters, or of tokens."""


def messages_of(question: Asked, system: str | None) -> tuple[Message, ...]:
    """All that is said before the answer, the system prompt first.

    Raises:
        TypeError: for what is neither words nor messages.
        ValueError: if there is no question, a text is none, or a system prompt is given twice.
    """
    asked = as_question(question)
    if system is not None:
        check_text("system prompt", system)
    if isinstance(asked, str):
        check_text("question", asked)
        if not asked.strip():
            raise ValueError("the question is empty: expected some text")
        said: tuple[Message, ...] = (Message("user", asked),)
    else:
        said = asked.messages
        for role, content in said:
            check_text(f"words of the {role}", content)
        check_one_system_prompt(asked, system)
    return (Message("system", system), *said) if system else said


def check_one_system_prompt(question: object, system: str | None) -> None:
    """Raises `ValueError` for a system prompt beside that of a conversation."""
    if system and isinstance(question, Conversation) and question.messages[0].role in ("system", "developer"):
        raise ValueError(
            f"got system={system[:60]!r} beside the message of the {question.messages[0].role} "
            f"{question.messages[0].content[:60]!r}: leave out one of the two"
        )


def holds_one_question(messages: Sequence[Message]) -> bool:
    """Whether messages are the user's question, perhaps behind a system prompt: what every format has a place for."""
    return [role for role, _ in messages] in (["user"], ["system", "user"])


def without_blanks(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same without blanks around what user and assistant say."""
    return tuple(Message(role, text if role == "system" else text.strip()) for role, text in messages)


def rendered(prompt_format: Any, messages: Sequence[Message], tokenizer: Any) -> str:
    """The text that a format makes of messages.

    Raises:
        ValueError: for several turns in a format of one question, or in one that makes other text of a question.
    """
    if holds_one_question(messages):
        return str(prompt_format.render(messages[-1].content, messages[0].content if len(messages) > 1 else None))
    if prompt_format.converse is None:
        raise ValueError(
            f"got messages of {', '.join(role for role, _ in messages)}, but the format {prompt_format.name!r} holds "
            "one question and no earlier turns: ask in one message, or give prompt_format='chat-template' to a model "
            "whose tokenizer has a chat template"
        )
    _check_alike(prompt_format, messages, tokenizer)
    return str(prompt_format.converse(messages, tokenizer))


def check_held(name: str, text: str, messages: Sequence[Message]) -> None:
    """Raises `ValueError` for a message whose words are not in the text: provenance says that they are."""
    for role, content in messages:
        words = content.strip() if role != "system" else content
        if words in text:
            continue
        of = "question" if holds_one_question(messages) else f"words of the {role}"
        what = "system prompt" if role == "system" else of
        raise ValueError(
            f"the prompt format {name!r} drops or changes the {what} {words[:60]!r}: give it as the "
            f"format wants it{', leave it out' if role == 'system' else ''}, or mend the format's render"
        )


def places(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> tuple[Turn, ...]:
    """Where in a text each message's words are: the text is rendered again, with other characters in their places.

    Where a template makes another text of other words, they are looked for one behind the other, and a message that is
    not found so is left out.
    """
    marks = [chr(0xF0000 + n) * len(content) for n, (_, content) in enumerate(messages)]
    try:
        hidden = render([Message(role, mark) for (role, _), mark in zip(messages, marks, strict=True)])
    except ValueError:
        hidden = ""
    found, at = [], 0
    for (role, content), mark in zip(messages, marks, strict=True):
        start = hidden.find(mark)
        if len(hidden) != len(text) or text[start : start + len(content)] != content:
            start = text.find(content, at)
        if start >= 0:
            at = start + len(content)
            found.append((role, start, at))
    return tuple(found)


def _check_alike(prompt_format: Any, messages: Sequence[Message], tokenizer: Any) -> None:
    """Raises `ValueError` if `converse` makes another text of the last question alone than `render` does.

    So it is where one of the two was replaced in a format, and the other was not.
    """
    system = messages[0].content if messages[0].role == "system" else None
    if messages[-1].role != "user":
        return
    alone = [*messages[: 1 if system else 0], messages[-1]]
    text = prompt_format.converse(alone, tokenizer)
    once, again = (prompt_format.render(alone[-1].content, system) for _ in range(2))
    if once == again != text:  # some templates tell the time
        raise ValueError(
            f"the prompt format {prompt_format.name!r} has one text of a question and another of the same as messages: "
            "its converse is not that of its render; replace both, or give converse=None, which holds one question"
        )
