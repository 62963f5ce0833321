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

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from caa_lens.arguments import check_count, check_list
from caa_lens.contrast.messages import Asked, Message
from caa_lens.models.checks import check_model
from caa_lens.prompts.chat_templates import (
    Converse,
    Render,
    as_render,
    is_llama2_template,
    llama2_base,
    llama2_chat,
    llama2_chat_meta,
    llama2_turns,
    raw_text,
    template_renderer,
)
from caa_lens.prompts.token_spans import (
    check_offsets,
    encode_as_text,
    encode_whole,
    find_special_tokens,
    mask,
    token_span,
)
from caa_lens.prompts.turns import Turn, check_held, messages_of, places, rendered, without_blanks
from caa_lens.prompts.users_words import GuessedFormatWarning, check_text, warn_of_words


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Token ids of one prompt and its positions (0-based, unpadded); `Prompt.of(model, question)` makes one.

    Attributes:
        text: what was tokenized (without BOS).
        tokens: token ids, BOS included if the format has one.
        steer_start: index of the first steered token: the instruction's last one, or as many later as the format's
            `start_offset` says.
        answer_start: index of the answer's first token; `len(tokens)` if there is no answer.
        read: half-open span of the tokens that extraction reads: the letter, or the whole completion.
        format_name: of the format that made it; `explain` shows it.
        turns: of a conversation, each message's role and the half-open span of the tokens of its words.
    """

    text: str
    tokens: tuple[int, ...]
    steer_start: int
    answer_start: int
    read: tuple[int, int]
    format_name: str = field(default="as given", compare=False)
    turns: tuple[Turn, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        model: Any,
        question: Asked,
        answer: str = "",
        *,
        system: str | None = None,
        prompt_format: "PromptFormat | str | None" = None,
    ) -> "Prompt":
        """A question (words or messages), with (the beginning of) an answer, in the model's own format; see `encode`.

        prompt = Prompt.of(model, "How was your day?")
        logits = model(torch.tensor([prompt.tokens]))
        """
        check_model(model)
        chosen = resolve_format(model, prompt_format)
        return chosen.encode(model.tokenizer, question, answer, system=system)

    @classmethod
    def from_tokens(
        cls, tokens: "Sequence[int] | Int[Tensor, ' pos'] | Int[Tensor, '1 pos']", *, start: int | None = None
    ) -> "Prompt":
        """A prompt of token ids as they are, also for a model without a tokenizer.

        Args:
            tokens: a list, or a tensor `[pos]` or `[1, pos]`, BOS included if the model wants one.
            start: the first steered position; the last token by default, which predicts the answer's first.

        Raises:
            TypeError: for anything but whole numbers.
            ValueError: for no tokens, a negative one, or a start outside of the prompt.
        """
        given = tokens[0] if getattr(tokens, "ndim", 1) == 2 and len(tokens) == 1 else tokens
        ids = tuple(check_list("tokens", given, int))
        if not ids or min(ids) < 0:
            raise ValueError(f"expected token ids from 0 on, got {list(ids)[:8] or 'none'}")
        n = len(ids)
        start = n - 1 if start is None else check_count("start", start, least=0)
        if start >= n:
            raise ValueError(f"start={start} is outside of the prompt, which has positions 0 to {n - 1}")
        return cls(text="", tokens=ids, steer_start=start, answer_start=n, read=(n - 1, n))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question becomes text, and where in it steering starts.

    The options are changed with `dataclasses.replace(default_format(model), start_offset=1)`, and such a format is
    given as `prompt_format=...` to whatever makes prompts. `name` then tells of them.

    Attributes:
        name: recorded in provenance; options other than the defaults are appended to it.
        render: `(question, system) -> text`, up to and including the instruction's last token.
        converse: the same of several turns, `(messages, tokenizer) -> text`; None if the format holds one question.
        separator: what stands between the instruction and the answer.
        prepend_bos: whether the tokenizer's BOS is put in front, once.
        strip: whether blanks around the question are left out, as the CAA authors' code does in Llama 2's formats,
            with a `StrippedQuestionWarning`; else the question is taken character for character.
        special_tokens_as_text: whether special tokens in question, answer and system prompt (`</s>`, `<|im_end|>`)
            are encoded as the characters they are written with. Those of the format itself stay control tokens.
        start_offset: 0: steering starts at the instruction's last token (the paper); 1: one token later, as in older
            revisions of the authors' code.
    """

    name: str
    render: Render = field(repr=False)
    separator: str
    prepend_bos: bool
    converse: Converse | None = field(default=None, repr=False)
    strip: bool = False
    special_tokens_as_text: bool = False
    start_offset: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.start_offset, bool) or self.start_offset not in (0, 1):
            raise ValueError(
                f"got start_offset={self.start_offset!r}, expected 0 (steering starts at the instruction's last token) "
                "or 1 (one token later, as in the authors' older revisions)"
            )
        options = ["start_offset=1"] * self.start_offset + ["special tokens as text"] * self.special_tokens_as_text
        plain = re.sub(r" \[(start_offset=1|special tokens as text|, )+\]$", "", self.name)
        object.__setattr__(self, "name", f"{plain} [{', '.join(options)}]" if options else plain)

    def encode(
        self,
        tokenizer: Any,
        question: Asked,
        answer: str = "",
        *,
        system: str | None = None,
        read: tuple[int, int] | None = None,
        warn: bool = True,
    ) -> Prompt:
        """Tokenize a question with (the beginning of) an answer.

        Args:
            tokenizer: a fast Hugging Face tokenizer (it must give character offsets).
            question: the user's words; or messages, `{"role": ..., "content": ...}`, that end with the user's.
            answer: the answer's text, or "" for a prompt to generate from.
            system: system prompt, if any.
            read: character span of `answer` that extraction reads; the whole answer by default.
            warn: whether `warn_of_words` looks at these words; of many prompts, call it once.

        Raises:
            TypeError: if the tokenizer is missing or gives no character offsets, or a text is not a `str`.
            ValueError: if the question is empty, a text holds half a surrogate pair, the format drops or changes the
                question or the system prompt, or BOS is asked of a tokenizer that has none; for messages that the
                format does not take, or that hold a system prompt beside `system`.

        Warns:
            TemplateInQuestionWarning: if the question contains marks of this format.
            SpecialTokenWarning: if the words contain other special tokens.
            StrippedQuestionWarning: if blanks around the question are left out.
            JoinedWordsWarning: if the format puts nothing between text and answer, and neither do they.
        """
        check_offsets(tokenizer)
        messages = messages_of(question, system)
        check_text("answer", answer)
        if warn:
            warn_of_words(self, tokenizer, [question], [answer], system=system)
        if self.render is raw_text and not isinstance(question, str):
            raise ValueError(
                "got messages for the format 'raw', which takes a text as it is: give a text, or choose a format with "
                "a chat template, prompt_format='chat-template'"
            )
        said = without_blanks(messages) if self.strip else messages
        instruction = self._instruction(tokenizer, said)
        text = instruction + (self.separator + answer if answer else "")
        tokens, spans = self._tokenize(tokenizer, text, said, answer)
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
        answer_start, read_span = len(tokens), (len(tokens) - 1, len(tokens))
        if answer:
            answer_start, _ = token_span(spans, len(instruction), len(text), text)
            read_span = token_span(spans, answer_char + first, answer_char + last, text)
        spoken: tuple[Turn, ...] = ()
        if not isinstance(question, str):
            spoken = places(instruction, said, lambda other: rendered(self, other, tokenizer))
        return Prompt(
            text=text,
            tokens=tuple(tokens),
            steer_start=token_span(spans, instruction_end - 1, instruction_end, text)[1] - 1 + self.start_offset,
            answer_start=answer_start,
            read=read_span,
            format_name=self.name,
            turns=tuple((role, *token_span(spans, start, stop, text)) for role, start, stop in spoken),
        )

    def _instruction(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """The rendered messages, which must hold what they were given: provenance says that they do."""
        instruction = rendered(self, messages, tokenizer)
        check_held(self.name, instruction, messages)
        return instruction

    def _tokenize(self, tokenizer: Any, text: str, messages: Sequence[Message], answer: str) -> Any:
        words = [*(content for _, content in messages), answer]
        if not self.special_tokens_as_text or not any(find_special_tokens(tokenizer, one) for one in words):
            return encode_whole(tokenizer, text)
        *said, answered = mask(tokenizer, *words)
        hidden = [Message(role, one) for (role, _), one in zip(messages, said, strict=True)]
        masked = self._instruction(tokenizer, hidden) + (self.separator + answered if answer else "")
        if len(masked) != len(text):
            raise ValueError(
                f"the prompt format {self.name!r} makes another text of a question with special tokens: take them out "
                "of it, or leave special_tokens_as_text out"
            )
        return encode_as_text(tokenizer, text, masked)


LLAMA2_BASE = PromptFormat(name="llama2-base", render=llama2_base, separator=" ", prepend_bos=True, strip=True)
LLAMA2_CHAT, LLAMA2_CHAT_META = (
    replace(LLAMA2_BASE, name=name, render=render, converse=llama2_turns(render))
    for name, render in (("llama2-chat", llama2_chat), ("llama2-chat-meta", llama2_chat_meta))
)
FORMATS = {fmt.name: fmt for fmt in (LLAMA2_CHAT, LLAMA2_CHAT_META, LLAMA2_BASE)}

# A hub id, in which the owner may be anyone's copy. A folder's name, which anyone may choose, has no owner.
_LLAMA2_ID = re.compile(r"[\w.-]+/Llama-?2-\d+b(-chat)?(-hf)?", re.IGNORECASE)


def chat_template_format(tokenizer: Any) -> PromptFormat:
    """The tokenizer's own chat template. It writes its special tokens itself, so no BOS is added to it.

    Steering starts at the last token of the generation prompt, the counterpart of the last token of `[/INST]`. A
    question that the template strips, shortens or drops is refused, and so are a system prompt and turns that it does
    not take.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: use prompts.LLAMA2_BASE or a PromptFormat of your own")
    converse = template_renderer(tokenizer)
    render = as_render(converse, tokenizer)
    return PromptFormat(name="chat-template", render=render, separator="", prepend_bos=False, converse=converse)


def raw_format(tokenizer: Any) -> PromptFormat:
    """A text as it is, without any template: what a base model goes on with.

    The answer follows directly, without a separator. Steering starts at the text's last token, that of its last
    character that is no blank. BOS is put in front where the tokenizer itself puts it in front of a text.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    prepend_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return PromptFormat(name="raw", render=raw_text, separator="", prepend_bos=prepend_bos)


def default_format(model: Any) -> PromptFormat:
    """The format that follows from a checkpoint, whatever its folder is called.

    1. The tokenizer's chat template. Where that is Llama 2's own, `llama2-chat`: the same text, but with the system
       prompt in the CAA authors' place.
    2. Without a template, the checkpoint's hub id: config.json's `_name_or_path`, that of its place in a hub cache, or
       the one it was loaded by. Llama 2's chat models have `llama2-chat`, its base models `llama2-base`.
    3. Else `llama2-base`, with BOS if the tokenizer has one.

    Warns:
        GuessedFormatWarning: in the third case.
    """
    tokenizer = model.tokenizer
    if getattr(tokenizer, "chat_template", None):
        return LLAMA2_CHAT if is_llama2_template(tokenizer) else chat_template_format(tokenizer)
    for name in (getattr(model.cfg, "tokenizer_name", None), model.cfg.model_name):
        if found := _LLAMA2_ID.fullmatch(str(name)):
            return LLAMA2_CHAT if found[1] else LLAMA2_BASE
    if tokenizer is not None:
        warnings.warn(
            f"nothing says how {model.cfg.model_name!r} is prompted: its tokenizer has no chat template, and it has no "
            "hub id of a Llama 2. 'llama2-base' was chosen, 'Input: ...' and 'Response:'; say prompt_format="
            "'llama2-base' if that is right, 'llama2-chat' for a chat model of Llama 2, or give a PromptFormat",
            GuessedFormatWarning,
            stacklevel=2,
        )
    return replace(LLAMA2_BASE, prepend_bos=tokenizer is not None and tokenizer.bos_token_id is not None)


def resolve_format(model: Any, prompt_format: PromptFormat | str | None) -> PromptFormat:
    """A format as such, by name (`llama2-chat`, `llama2-chat-meta`, `llama2-base`, `chat-template`, `raw`), or None."""
    if prompt_format is None:
        return default_format(model)
    if isinstance(prompt_format, PromptFormat):
        return prompt_format
    if prompt_format == "chat-template":
        return chat_template_format(model.tokenizer)
    if prompt_format == "raw":
        return raw_format(model.tokenizer)
    if prompt_format not in FORMATS:
        raise ValueError(
            f"unknown prompt format {prompt_format!r}: expected one of {', '.join(FORMATS)}, chat-template, raw, or a "
            "PromptFormat"
        )
    return FORMATS[prompt_format]


def encode_answer(
    prompt_format: PromptFormat,
    tokenizer: Any,
    question: Asked,
    answer: str,
    *,
    system: str | None = None,
    warn: bool = True,
) -> Prompt:
    """A question with an answer, reading the letter of `(A)`, or every token of a full completion."""
    letter = (1, 2) if len(answer) == 3 and answer[0] == "(" and answer[2] == ")" else None
    return prompt_format.encode(tokenizer, question, answer, system=system, read=letter, warn=warn)


def encode_letters(
    prompt_format: PromptFormat,
    tokenizer: Any,
    question: Asked,
    letters: Sequence[str],
    *,
    system: str | None = None,
    warn: bool = True,
) -> tuple[Prompt, tuple[int, ...]]:
    """A question up to the answer's opening bracket, and the token id of each letter that may follow.

    Args:
        letters: bare letters, e.g. `("A", "B")`.
        warn: as `PromptFormat.encode`.

    Raises:
        ValueError: if `(A` and `(B` are not the same tokens followed by distinct single tokens, because then the
            letters' probabilities at one position cannot be compared.
    """
    opened = prompt_format.encode(tokenizer, question, "(", system=system, warn=warn)
    ids = []
    for letter in letters:
        full = encode_answer(prompt_format, tokenizer, question, f"({letter})", system=system, warn=False)
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
