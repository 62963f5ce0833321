"""A question in messages: what was said before an answer, as chat templates take it.

A question is a text, or a `Conversation`: messages of a role and a text, the last of them what is answered.
`as_question` makes either of what users write. The user's message alone is the plain text, so that both are equal
everywhere.

Which roles may follow each other is the chat template's affair (see `caa_lens.prompts.chat_templates`); here is what no
template could mean.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from caa_lens.arguments import describe
from caa_lens.contrast.errors import FieldError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
# What other data sets call them.
_CALLED = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
_MARKS = (("role", "content"), ("from", "value"))
# What templates would render, and a role with a text does not hold.
_MORE = ("tool_calls", "tool_call_id", "function_call", "images", "audio", "reasoning_content", "thinking")
_JSON_LIST = re.compile(r"\s*\[\s*\{")
_ONE_MESSAGE = "messages of a role and a text, {'role': 'user', 'content': '...'}"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Conversation:
    """Messages before an answer: a question like any, wherever a question is taken. `Conversation.of(list)` makes one.

    Lists of messages need not be made into one by hand: they are where they are given.

    Attributes:
        messages: role and content of each; the last is what is answered.

    Raises:
        FieldError: a `ValueError`, for no message, a role that is none, an empty text, or an answer at the end.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        if not self.messages:
            raise FieldError(None, "no message", "one at least")
        for n, (role, content) in enumerate(self.messages, start=1):
            if role not in ROLES:
                raise FieldError(None, f"the role {role!r} in message {n}", f"one of {', '.join(ROLES)}")
            if not content.strip():
                raise FieldError(None, f"no text in message {n}, of the role {role}", "some: leave the message out")
        last = self.messages[-1].role
        if last == "assistant":
            raise FieldError(
                None,
                f"{self._roles()}: the assistant's last",
                "what is answered at the end, the user's message; how an answer begins is given as the answer, "
                "Prompt.of(model, messages[:-1], messages[-1]['content'])",
            )
        if last not in ("user", "tool"):
            raise FieldError(None, self._roles(), "what is answered at the end, the user's message")

    @classmethod
    def of(cls, messages: Any) -> "Conversation":
        """A conversation of a list of messages, `{"role": "user", "content": "..."}`.

        Raises:
            TypeError: for what is no list of messages.
            FieldError: a `ValueError`, for messages that are no question.
        """
        if isinstance(messages, Conversation):
            return messages
        if not is_messages(messages):
            raise TypeError(f"expected a list of messages with a role and a content, got {describe(messages)}")
        return cls(messages=tuple(message_of(one, None) for one in messages))

    @property
    def last(self) -> str:
        """What is answered: the text of the last message."""
        return self.messages[-1].content

    def with_last(self, content: str) -> "Conversation":
        """The same with another text in its last message."""
        return Conversation(messages=(*self.messages[:-1], Message(self.messages[-1].role, content)))

    def to_list(self) -> list[dict[str, str]]:
        """Messages as `tokenizer.apply_chat_template` and JSON have them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    def __str__(self) -> str:
        return "\n\n".join(f"{role}: {content}" for role, content in self.messages)

    def __repr__(self) -> str:
        return f"Conversation.of({self.to_list()!r})"

    def _roles(self) -> str:
        roles = [role for role, _ in self.messages]
        return f"messages of {', '.join(roles[:6])}{', ...' if roles[6:] else ''}"


Question: TypeAlias = str | Conversation
"""A question, as it is kept."""
Asked: TypeAlias = str | Conversation | Sequence[Mapping[str, Any]]
"""A question, as it may be written."""


def is_messages(value: object) -> bool:
    """Whether a value is a list of messages, or a `Conversation`: one question, not several."""
    if isinstance(value, Conversation):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return False
    return all(isinstance(one, Mapping | Message) for one in value)


def as_question(value: object, field: str | None = None) -> Question:
    """A question as it is kept: a text as it is; of messages a `Conversation`, or of the user's only one its text.

    A system message without text is none, as everywhere.

    Raises:
        TypeError: for anything else.
        FieldError: a `ValueError`, for messages that are no question, in the name of `field`.
    """
    if isinstance(value, str | Conversation):
        found: Question = value
    else:
        if isinstance(value, Sequence) and not isinstance(value, bytes) and not value:
            raise FieldError(field, "an empty list", "a text, or one message at least")
        if not is_messages(value):
            raise TypeError(f"expected one question in words, or a list of messages, got {describe(value)}")
        assert isinstance(value, Sequence)
        messages = [message_of(one, field) for one in value]
        if len(messages) > 1 and messages[0].role == "system" and not messages[0].content.strip():
            messages = messages[1:]
        try:
            found = Conversation(messages=tuple(messages))
        except FieldError as error:
            raise FieldError(field, error.found, error.expected) from None
    if isinstance(found, Conversation) and [role for role, _ in found.messages] == ["user"]:
        return found.last
    return found


def message_of(message: Any, field: str | None) -> Message:
    """One message, whatever a data set calls its parts."""
    if isinstance(message, Message):
        return message
    for role, content in _MARKS:
        if not isinstance(message.get(role), str) or content not in message:
            continue
        words = message[content]
        if isinstance(words, Sequence) and not isinstance(words, str):
            kinds = sorted({str(part.get("type")) if isinstance(part, Mapping) else "text" for part in words})
            found = f"a message with a list of parts ({', '.join(kinds) or 'none'})"
            raise FieldError(field, found, "its words in one text; images and sounds are not taken")
        if more := [key for key in _MORE if message.get(key)]:
            raise FieldError(field, f"a message with {more[0]!r}", f"{_ONE_MESSAGE}, without it: it would be lost")
        if isinstance(words, str):
            name = message[role].strip().lower()
            return Message(_CALLED.get(name, name), words)
    raise FieldError(field, f"a message {shown(dict(message))}", _ONE_MESSAGE)


def messages_of_json(text: str) -> list[Message] | None:
    """Messages that a text holds as JSON, as cells of tables do; None for any other text."""
    if not _JSON_LIST.match(text):
        return None
    try:
        return [message_of(one, None) for one in json.loads(text)]
    except (ValueError, RecursionError, AttributeError):
        return None


def texts_of(question: Asked) -> tuple[str, ...]:
    """The words of a question: itself, or what each message says."""
    asked = as_question(question)
    return (asked,) if isinstance(asked, str) else tuple(content for _, content in asked.messages)


def plain_data(question: Asked) -> str | list[dict[str, str]]:
    """A question as JSON holds it."""
    asked = as_question(question)
    return asked if isinstance(asked, str) else asked.to_list()


def followed_by(question: Asked, words: str) -> Question:
    """A question with words behind it, a blank between: behind its last message."""
    return with_last_words(question, f"{last_words(question)} {words}")


def last_words(question: Asked) -> str:
    """What is answered: a text, or the last message of a conversation."""
    return texts_of(question)[-1]


def with_last_words(question: Asked, words: str) -> Question:
    """The question with other words in the place of its last."""
    asked = as_question(question)
    return words if isinstance(asked, str) else asked.with_last(words)
