"""Prompt formats: questions and answers to token ids, with the exact positions that matter.

A format is the text up to the end of the instruction, and what separates it from the answer. The whole text is
tokenized once, and positions come from the template's own character offsets, never from a search for a marker::

    <s> [INST] How are you? [/INST] (A)
                                  ^  ^^
                                  |  |+- the answer letter: what extraction reads
                                  |  +-- the answer starts
                                  +----- last token of the instruction: steering starts here

Source: paper section 3 and appendix; the authors' own place of the system prompt is `LLAMA2_CHAT`, Meta's is
`LLAMA2_CHAT_META`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of one prompt and its positions (0-based, unpadded); `Prompt.of(model, question)` makes one.

    Attributes:
        text: what was tokenized (without BOS).
        tokens: token ids, BOS included if the format has one.
        steer_start: index of the instruction's last token, the first one that is steered.
        answer_start: index of the answer's first token; `len(tokens)` if there is no answer.
        read: half-open span of the tokens that extraction reads: the letter, or the whole completion.
    """

    text: str
    tokens: tuple[int, ...]
    steer_start: int
    answer_start: int
    read: tuple[int, int]

    @classmethod
    def of(
        cls,
        model: Any,
        question: str,
        answer: str = "",
        *,
        system: str | None = None,
        prompt_format: "PromptFormat | str | None" = None,
    ) -> "Prompt":
        """A question, with (the beginning of) an answer, in the model's own format; see `PromptFormat.encode`.

        prompt = Prompt.of(model, "How was your day?")
        logits = model(torch.tensor([prompt.tokens]))
        """
        chosen = resolve_format(model, prompt_format)
        return chosen.encode(model.tokenizer, question, answer, system=system)

    def __len__(self) -> int:
        return len(self.tokens)


class TemplateInQuestionWarning(UserWarning):
    """A question that already is in a prompt format is put into it once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question becomes text.

    Attributes:
        name: recorded in provenance.
        render: `(question, system) -> text`, up to and including the instruction's last token.
        separator: what stands between the instruction and the answer.
        prepend_bos: whether the tokenizer's BOS is put in front, once.
    """

    name: str
    render: Callable[[str, str | None], str] = field(repr=False)
    separator: str
    prepend_bos: bool

    def encode(
        self,
        tokenizer: Any,
        question: str,
        answer: str = "",
        *,
        system: str | None = None,
        read: tuple[int, int] | None = None,
    ) -> Prompt:
        """Tokenize a question with (the beginning of) an answer.

        Args:
            tokenizer: a fast Hugging Face tokenizer (it must give character offsets).
            question: the user's words.
            answer: the answer's text, or "" for a prompt to generate from.
            system: system prompt, if any.
            read: character span of `answer` that extraction reads; the whole answer by default.

        Raises:
            TypeError: if the tokenizer is missing or gives no character offsets.
            ValueError: if the question is empty, or BOS is asked of a tokenizer that has none.

        Warns:
            TemplateInQuestionWarning: if the question contains marks of this format.
        """
        if tokenizer is None:
            raise TypeError("this model has no tokenizer: load it from a folder that has tokenizer files")
        if not isinstance(question, str):
            raise TypeError(f"expected one question in words, got {type(question).__name__}")
        if system is not None and not isinstance(system, str):
            raise TypeError(f"expected a system prompt in words, got {system!r}")
        if not question.strip():
            raise ValueError("the question is empty: expected some text")
        instruction = self.render(question.strip(), system)
        text = instruction + (self.separator + answer if answer else "")
        if not tokenizer.is_fast:
            raise TypeError(
                f"{type(tokenizer).__name__} gives no character offsets, which positions are computed from: "
                "load the fast tokenizer (AutoTokenizer with use_fast=True)"
            )
        self._warn_of_marks(tokenizer, question, instruction)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, spans = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if self.prepend_bos:
            if tokenizer.bos_token_id is None:
                raise ValueError(
                    f"format {self.name!r} starts with BOS, but this tokenizer has none: "
                    "use a format with prepend_bos=False"
                )
            tokens, spans = [tokenizer.bos_token_id, *tokens], [(0, 0), *spans]

        instruction_end = len(instruction.rstrip(" "))
        answer_char = len(instruction) + len(self.separator)
        first, last = read if read is not None else (0, len(answer))
        answer_start, _ = _token_span(spans, len(instruction), len(text)) if answer else (len(tokens), 0)
        read_span = (
            _token_span(spans, answer_char + first, answer_char + last) if answer else (len(tokens) - 1, len(tokens))
        )
        return Prompt(
            text=text,
            tokens=tuple(tokens),
            steer_start=_token_span(spans, instruction_end - 1, instruction_end)[1] - 1,
            answer_start=answer_start,
            read=read_span,
        )

    def _warn_of_marks(self, tokenizer: Any, question: str, instruction: str) -> None:
        around = instruction.replace(question.strip(), "", 1)
        for mark in (*tokenizer.all_special_tokens, "[INST]"):
            if mark in question and mark in around:
                warnings.warn(
                    f"the question contains {mark!r}, a mark of the format {self.name!r} that it is put into, so the "
                    "model sees it twice: give the bare question, or a Prompt, which is taken as it is",
                    TemplateInQuestionWarning,
                    stacklevel=3,
                )
                return


def _token_span(spans: Sequence[tuple[int, int]], first_char: int, last_char: int) -> tuple[int, int]:
    """Half-open span of the tokens that overlap the characters `[first_char, last_char)`."""
    touching = [i for i, (start, end) in enumerate(spans) if start < last_char and end > first_char]
    assert touching, f"no token covers characters {first_char} to {last_char}"
    return touching[0], touching[-1] + 1


def _llama2_chat(question: str, system: str | None) -> str:
    return (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "") + f"[INST] {question} [/INST]"


def _llama2_chat_meta(question: str, system: str | None) -> str:
    return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{question} [/INST]" if system else f"[INST] {question} [/INST]"


def _llama2_base(question: str, system: str | None) -> str:
    return (f"{system}\n\n" if system else "") + f"Input: {question}\nResponse:"


LLAMA2_CHAT = PromptFormat(name="llama2-chat", render=_llama2_chat, separator=" ", prepend_bos=True)
LLAMA2_CHAT_META = PromptFormat(name="llama2-chat-meta", render=_llama2_chat_meta, separator=" ", prepend_bos=True)
LLAMA2_BASE = PromptFormat(name="llama2-base", render=_llama2_base, separator=" ", prepend_bos=True)
FORMATS = {fmt.name: fmt for fmt in (LLAMA2_CHAT, LLAMA2_CHAT_META, LLAMA2_BASE)}


def chat_template_format(tokenizer: Any) -> PromptFormat:
    """The tokenizer's own chat template. It writes its special tokens itself, so no BOS is added to it.

    Steering starts at the last token of the generation prompt, the counterpart of the last token of `[/INST]`.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: use prompts.LLAMA2_BASE or a PromptFormat of your own")

    def render(question: str, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return PromptFormat(name="chat-template", render=render, separator="", prepend_bos=False)


def default_format(model: Any) -> PromptFormat:
    """The format a model was trained on: Llama 2's by its name, else the tokenizer's chat template, else base."""
    name = str(model.cfg.model_name).lower()
    if "llama-2" in name or "llama2" in name:
        return LLAMA2_CHAT if "chat" in name else LLAMA2_BASE
    if getattr(model.tokenizer, "chat_template", None):
        return chat_template_format(model.tokenizer)
    has_bos = model.tokenizer is not None and model.tokenizer.bos_token_id is not None
    return PromptFormat(name=LLAMA2_BASE.name, render=_llama2_base, separator=" ", prepend_bos=has_bos)


def resolve_format(model: Any, prompt_format: PromptFormat | str | None) -> PromptFormat:
    """A format given as such, by name (`llama2-chat`, `llama2-chat-meta`, `llama2-base`, `chat-template`), or None."""
    if prompt_format is None:
        return default_format(model)
    if isinstance(prompt_format, PromptFormat):
        return prompt_format
    if prompt_format == "chat-template":
        return chat_template_format(model.tokenizer)
    if prompt_format not in FORMATS:
        raise ValueError(
            f"unknown prompt format {prompt_format!r}: expected one of {', '.join([*FORMATS, 'chat-template'])}, "
            "or a PromptFormat"
        )
    return FORMATS[prompt_format]


def encode_answer(
    prompt_format: PromptFormat, tokenizer: Any, question: str, answer: str, *, system: str | None = None
) -> Prompt:
    """A question with an answer, reading the letter of `(A)`, or every token of a full completion."""
    letter = (1, 2) if len(answer) == 3 and answer[0] == "(" and answer[2] == ")" else None
    return prompt_format.encode(tokenizer, question, answer, system=system, read=letter)


def encode_letters(
    prompt_format: PromptFormat,
    tokenizer: Any,
    question: str,
    letters: Sequence[str],
    *,
    system: str | None = None,
) -> tuple[Prompt, tuple[int, ...]]:
    """A question up to the answer's opening bracket, and the token id of each letter that may follow.

    Args:
        letters: bare letters, e.g. `("A", "B")`.

    Raises:
        ValueError: if `(A` and `(B` are not the same tokens followed by distinct single tokens, because then the
            letters' probabilities at one position cannot be compared.
    """
    opened = prompt_format.encode(tokenizer, question, "(", system=system)
    ids = []
    for letter in letters:
        full = encode_answer(prompt_format, tokenizer, question, f"({letter})", system=system)
        if full.tokens[: full.read[0]] != opened.tokens or full.read[1] - full.read[0] != 1:
            pieces = tokenizer.convert_ids_to_tokens(list(full.tokens[opened.answer_start :]))
            raise ValueError(
                f"the answer '({letter})' is tokenized as {pieces}, expected '(' and then one token for the letter: "
                "A/B answers cannot be scored with this tokenizer; use full completions"
            )
        ids.append(full.tokens[full.read[0]])
    if len(set(ids)) != len(ids):
        raise ValueError(f"the letters {tuple(letters)} have token ids {ids}, expected distinct ones")
    return opened, tuple(ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptBatch:
    """Left-padded prompts; all positions are padded coordinates.

    Attributes:
        tokens: token ids, `[batch pos]`.
        attention_mask: False on padding, `[batch pos]`.
        padding: number of padding tokens of each row, `[batch]`.
        steer_start: first steered position of each row, `[batch]`.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    padding: Int[Tensor, " batch"]
    steer_start: Int[Tensor, " batch"]


def left_pad(
    prompts: Sequence[Prompt], *, n_ctx: int, device: torch.device | str = "cpu", room: int = 0
) -> PromptBatch:
    """Pad prompts on the left to one length.

    Args:
        n_ctx: the model's context length.
        room: tokens that will be generated after the prompt.

    Raises:
        ValueError: if there are no prompts, or a prompt with `room` more tokens does not fit into the context.
    """
    if not prompts:
        raise ValueError("no prompts given: expected at least one")
    for prompt in prompts:
        check_fits(prompt, n_ctx, room)
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros((len(prompts), length), dtype=torch.long)
    padding = torch.tensor([length - len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt.tokens)
    return PromptBatch(
        tokens=tokens.to(device),
        attention_mask=(torch.arange(length) >= padding[:, None]).to(device),
        padding=padding.to(device),
        steer_start=(padding + torch.tensor([prompt.steer_start for prompt in prompts])).to(device),
    )


def check_fits(prompt: Prompt, n_ctx: int, room: int = 0) -> None:
    """Raise a ValueError if a prompt, with `room` tokens to come, is longer than the context."""
    if len(prompt) + room > n_ctx:
        wanted = f"{len(prompt)} tokens" + (f" and {room} to generate" if room else "")
        raise ValueError(
            f"the prompt has {wanted}, but the model's context is {n_ctx}: shorten it"
            f"{', or generate fewer' if room else ''}. It ends {prompt.text[-80:]!r}"
        )


def explain(prompt: Prompt, tokenizer: Any, *, steered: Sequence[bool] | None = None) -> str:
    """A table of a prompt's tokens that marks which are read and which are steered: all from the start on, or these."""
    marked = [pos >= prompt.steer_start for pos in range(len(prompt))] if steered is None else steered
    lines = [f"{'pos':>4} {'id':>6}  {'token':<20} read steered"]
    for pos, token in enumerate(prompt.tokens):
        read = "read" if prompt.read[0] <= pos < prompt.read[1] and prompt.answer_start < len(prompt) else ""
        mark = "steered" if marked[pos] else ""
        piece = repr(tokenizer.convert_ids_to_tokens(token))
        lines.append(f"{pos:>4} {token:>6}  {piece:<20} {read:<4} {mark}".rstrip())
    if steered is None:
        lines.append("and every generated token is steered")
    return "\n".join(lines)
