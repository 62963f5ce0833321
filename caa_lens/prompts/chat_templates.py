"""The text of a question: Llama 2's formats, and any tokenizer's chat template, held to its word.

Templates are programs. Some ignore a system prompt, or raise on one, some strip or shorten what the user says. Here the
question and the system prompt arrive in the text unchanged: every rendering is compared with that of a probe, so that
whatever is lost or changed is an error and not a result.
"""

import re
from collections.abc import Callable
from typing import Any

# Mixed case, two blanks and a line: what upper-casing and tidying would change.
_QUESTION, _SYSTEM = "Probe7:  qX\nyZ?", "Rule8:  wV\nuT!"
_NEITHER = "choose another format with prompt_format=..., or write a PromptFormat of your own"


def llama2_chat(question: str, system: str | None) -> str:
    return (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "") + f"[INST] {question} [/INST]"


def llama2_chat_meta(question: str, system: str | None) -> str:
    return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" if system else f"[INST] {question} [/INST]"


def llama2_base(question: str, system: str | None) -> str:
    return (f"{system}\n\n" if system else "") + f"Input: {question}\nResponse:"


def template_renderer(tokenizer: Any) -> Callable[[str, str | None], str]:
    """A `PromptFormat.render` of the tokenizer's chat template: up to the end of its generation prompt.

    What it returns raises `ValueError` if the template fails, or does not hold the question or the system prompt
    character for character.
    """
    probes: dict[bool, str] = {}  # what the template makes of the probes, with and without a system prompt

    def render(question: str, system: str | None) -> str:
        text = _apply(tokenizer, question, system)
        if bool(system) not in probes:
            probes[bool(system)] = _apply(tokenizer, _QUESTION, _SYSTEM if system else None)
        probe = probes[bool(system)]
        given = [question, system or ""]
        as_probed = text == _filled(probe, *given)
        for i, (what, probed) in enumerate((("question", _QUESTION), ("system prompt", _SYSTEM))):
            words = given[i]
            if not words or (as_probed and probed in probe):
                continue
            # The template may have its reasons (the time, say). But it must not just say these words itself, nor have a
            # blank of its own in the place of one of theirs.
            without, stripped = [*given], [*given]
            without[i], stripped[i] = "", words.strip()
            n_blanks = len(text) - len(_apply(tokenizer, *stripped))
            by_itself = _filled(probe, *without).count(words)
            if text.count(words) > by_itself and n_blanks == len(words) - len(words.strip()):
                continue
            shown = repr(words if len(words) <= 60 else f"{words[:40]}...{words[-17:]}")
            remedy = "put it into the question" if what == "system prompt" else "ask what the template keeps"
            raise ValueError(
                f"the model's chat template {_what_became_of(words, text)} the {what} {shown}: {remedy}, or {_NEITHER}"
            )
        return text

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
        alone, with_system = (_apply(tokenizer, _QUESTION, system) for system in (None, _SYSTEM))
    except ValueError:
        return False
    bos = tokenizer.bos_token or ""
    return _words(alone, bos) == asked and _words(with_system, bos) in told


def _words(text: str, bos: str = "") -> str:
    return "".join(text.removeprefix(bos).split())


def _apply(tokenizer: Any, question: str, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja's, the template's own, and what a template can do wrong in Python
        said = f"{type(error).__name__}: {error}"
    if system:
        try:
            _apply(tokenizer, question, None)
        except ValueError:
            pass  # then it is not the system prompt
        else:
            raise ValueError(
                f"the model's chat template takes no system prompt ({said}): put it into the question, or {_NEITHER}"
            )
    raise ValueError(f"the model's chat template failed on a single question ({said}): {_NEITHER}")


def _filled(probe: str, question: str, system: str) -> str:
    """A probe's text with other words in the places of the probes."""
    words = {_QUESTION: question, _SYSTEM: system}
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], probe)


def _what_became_of(words: str, text: str) -> str:
    if words != words.strip() and words.strip() in text:
        return "strips the blanks (give it without them, as text.strip() does) around"
    return "drops or changes"
