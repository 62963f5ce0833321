"""The text of a question: Llama 2's formats, and any tokenizer's chat template, held to its word.

Templates are programs. Some ignore a system prompt, or raise on one, some strip or shorten what the user says. Here the
words of every message arrive in the text unchanged: every rendering is compared with that of probes in their places, so
that whatever is lost or changed is an error and not a result. A role that a template renders as it does another is an
error, too. Which roles may follow each other, the template says.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from caa_lens.contrast.messages import Message

# Mixed case, two blanks and a line: what upper-casing and tidying would change.
_QUESTION, _SYSTEM = "Probe7:  qX\nyZ?", "Rule8:  wV\nuT!"
_NEITHER = "choose another format with prompt_format=..., or write a PromptFormat of your own"
_KNOWN = ("user", "assistant", "system")  # to every template that takes them at all

Render = Callable[[str, str | None], str]
"""A question and a system prompt to a text, up to and including the instruction's last token."""
Converse = Callable[[Sequence[Message], Any], str]
"""Messages and the tokenizer to a text, up to and including the last token of the instruction."""


def llama2_chat(question: str, system: str | None) -> str:
    return (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "") + f"[INST] {question} [/INST]"


def llama2_chat_meta(question: str, system: str | None) -> str:
    return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" if system else f"[INST] {question} [/INST]"


def llama2_turns(render: Render) -> Converse:
    """Several turns as Meta's code has them: each answer ends with EOS, and a BOS begins the turn behind it.

    The system prompt is in the first turn, where `render` has it.
    """

    def converse(messages: Sequence[Message], tokenizer: Any) -> str:
        system = messages[0].content if messages[0].role == "system" else None
        turns = messages[1:] if system else messages
        roles = [role for role, _ in turns]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError(
                f"got messages of {', '.join(role for role, _ in messages)}: Llama 2's format takes perhaps one system "
                "message, then user and assistant in turns, the user's last; join two of one role into one message"
            )
        if not tokenizer.bos_token or not tokenizer.eos_token:
            raise ValueError(
                "Llama 2's format writes BOS and EOS between turns, and this tokenizer has not both: give "
                "prompt_format='chat-template' to a tokenizer with a chat template"
            )
        text = ""
        for n in range(0, len(turns), 2):
            text += render(turns[n].content, system if n == 0 else None)
            if n + 1 < len(turns):
                text += f" {turns[n + 1].content} {tokenizer.eos_token}{tokenizer.bos_token}"
        return text

    return converse


def llama2_base(question: str, system: str | None) -> str:
    return (f"{system}\n\n" if system else "") + f"Input: {question}\nResponse:"


def raw_text(question: str, system: str | None) -> str:
    if system:
        raise ValueError(
            "the format 'raw' takes a text as it is, and has no place for a system prompt: put it into the text, or "
            "choose a format with prompt_format=..."
        )
    return question


def template_renderer(tokenizer: Any) -> Converse:
    """A `PromptFormat.converse` of the tokenizer's chat template: up to the end of its generation prompt.

    What it returns raises `ValueError` if the template fails, or does not hold the words of all messages character for
    character, in their roles.
    """
    probes: dict[tuple[str, ...], str] = {}  # what the template makes of probes in some roles

    def converse(messages: Sequence[Message], _: Any = None) -> str:
        text = _apply(tokenizer, messages)
        roles = tuple(role for role, _ in messages)
        probed = _probes(messages)
        if roles not in probes:
            probes[roles] = _apply(tokenizer, _with(messages, probed))
        probe = probes[roles]
        given = [words for _, words in messages]
        as_probed = text == _filled(probe, probed, given)
        for i, words in enumerate(given):
            if as_probed and probed[i] in probe:
                continue
            # The template may have its reasons (the time, say). But it must not just say these words itself, nor have a
            # blank of its own in the place of one of theirs.
            without, stripped = [*given], [*given]
            without[i], stripped[i] = "", words.strip()
            n_blanks = len(text) - len(_apply(tokenizer, _with(messages, stripped)))
            by_itself = _filled(probe, probed, without).count(words)
            if text.count(words) > by_itself and n_blanks == len(words) - len(words.strip()):
                continue
            shown = repr(words if len(words) <= 60 else f"{words[:40]}...{words[-17:]}")
            what = _called(messages, i)
            remedy = "put it into the question" if what == "system prompt" else "ask what the template keeps"
            raise ValueError(
                f"the model's chat template {_what_became_of(words, text)} the {what} {shown}: {remedy}, or {_NEITHER}"
            )
        for i, (role, words) in enumerate(messages):
            alike = [
                other
                for other in _KNOWN
                if role not in _KNOWN and _quietly(tokenizer, _replaced(messages, i, Message(other, words))) == text
            ]
            if alike:
                raise ValueError(
                    f"the model's chat template takes the role {role!r} for {alike[0]!r}: say {alike[0]!r} if that is "
                    f"meant, or {_NEITHER}"
                )
        return text

    return converse


def as_render(converse: Converse, tokenizer: Any) -> Render:
    """A `PromptFormat.render` of what turns messages into text."""

    def render(question: str, system: str | None) -> str:
        said = [Message("system", system)] if system else []
        return converse([*said, Message("user", question)], tokenizer)

    return render


def is_llama2_template(tokenizer: Any) -> bool:
    """Whether the template is that of Llama 2's chat models: a lone question is `[INST] ... [/INST]`, and no more.

    A system prompt stands inside of it, as in Meta's own, or before it, as in the CAA authors' code.
    """
    if "[INST]" not in str(tokenizer.chat_template) or "<<SYS>>" not in str(tokenizer.chat_template):
        return False
    asked = _words(llama2_chat(_QUESTION, None))
    told = [_words(render(_QUESTION, _SYSTEM)) for render in (llama2_chat, llama2_chat_meta)]
    try:
        asking = [Message("system", _SYSTEM), Message("user", _QUESTION)]
        alone, with_system = _apply(tokenizer, asking[1:]), _apply(tokenizer, asking)
    except ValueError:
        return False
    bos = tokenizer.bos_token or ""
    return _words(alone, bos) == asked and _words(with_system, bos) in told


def _words(text: str, bos: str = "") -> str:
    return "".join(text.removeprefix(bos).split())


def _apply(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        return _template(tokenizer, messages)
    except Exception as error:  # Jinja's, the template's own, and what a template can do wrong in Python
        said = f"{type(error).__name__}: {error}"
    if messages[0].role == "system" and _quietly(tokenizer, messages[1:]) is not None:
        raise ValueError(
            f"the model's chat template takes no system prompt ({said}): put it into the question, or {_NEITHER}"
        )
    if [role for role, _ in messages if role != "system"] == ["user"]:
        raise ValueError(f"the model's chat template failed on a single question ({said}): {_NEITHER}")
    raise ValueError(
        f"the model's chat template failed on messages of {', '.join(role for role, _ in messages)} ({said}): most "
        f"templates want user and assistant in turns, the user's last; or {_NEITHER}"
    )


def _template(tokenizer: Any, messages: Sequence[Message]) -> str:
    listed = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True))


def _quietly(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """What the template makes of messages; None where it fails."""
    try:
        return _template(tokenizer, messages)
    except Exception:  # as in _apply
        return None


def _probes(messages: Sequence[Message]) -> list[str]:
    """A text for each message, none of which is a part of another."""
    if [role for role, _ in messages][-2:] == [role for role, _ in messages]:
        return [_SYSTEM, _QUESTION][-len(messages) :]
    return [f"{n}{_QUESTION}" for n in range(10**6, 10**6 + len(messages))]


def _with(messages: Sequence[Message], words: Sequence[str]) -> list[Message]:
    return [Message(role, text) for (role, _), text in zip(messages, words, strict=True)]


def _replaced(messages: Sequence[Message], i: int, message: Message) -> list[Message]:
    return [*messages[:i], message, *messages[i + 1 :]]


def _called(messages: Sequence[Message], i: int) -> str:
    """What an error calls the words of a message."""
    if messages[i].role == "system" and i == 0:
        return "system prompt"
    if [role for role, _ in messages if role != "system"] == ["user"]:
        return "question"
    return f"words of the {messages[i].role} in message {i + 1},"


def _filled(probe: str, probed: Sequence[str], given: Sequence[str]) -> str:
    """A probe's text with other words in the places of the probes."""
    words = dict(zip(probed, given, strict=True))
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], probe)


def _what_became_of(words: str, text: str) -> str:
    if words != words.strip() and words.strip() in text:
        return "strips the blanks (give it without them, as text.strip() does) around"
    return "drops or changes"
