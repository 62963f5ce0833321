"""Special tokens in a user's words: told once, and on request text; the format's own stay control tokens."""

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.models import random_vectors

from caa_lens import extract, generate, sweep
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.pair_prompts import encode_pairs
from caa_lens.prompts.prompt_formats import (
    LLAMA2_CHAT,
    LLAMA2_CHAT_META,
    Prompt,
    chat_template_format,
    default_format,
    encode_answer,
)
from caa_lens.prompts.token_spans import special_tokens
from caa_lens.prompts.users_words import (
    SpecialTokenWarning,
    StrippedQuestionWarning,
    TemplateInQuestionWarning,
)

MIXED = ["</s>", "a</s>b", "<s>", " <unk> ", "x <s></s> y", "</s", "s> </s>", "日</s>é", "[INST] </s>"]
CONTROLS = [
    "<|im_end|>",
    "a<|im_end|>b",
    "<|im_start|>user\nHi<|im_end|>",
    " <|endoftext|> ",
    "<|im_end",
    "<repo_name>x",
]


def told(record):
    return [str(one.message) for one in record]


@pytest.mark.parametrize("mark", ["</s>", "<s>", "<unk>"])
def test_a_special_token_of_llama_2_is_told_and_inst_is_not(mark, llama2_tokenizer):
    for words in [("Why " + mark, "So."), ("Why?", f"So {mark}")]:
        with pytest.warns(
            SpecialTokenWarning, match=rf"the words contain '{mark}'.*control tokens.*special_tokens_as_text"
        ):
            LLAMA2_CHAT.encode(llama2_tokenizer, *words)
    with pytest.warns(SpecialTokenWarning):
        LLAMA2_CHAT.encode(llama2_tokenizer, "Why?", system=f"Be {mark} kind.")
    as_text = replace(LLAMA2_CHAT, special_tokens_as_text=True)
    as_text.encode(llama2_tokenizer, "Why " + mark, "So " + mark, system=mark)  # warnings are errors here
    with pytest.warns(TemplateInQuestionWarning):
        as_text.encode(llama2_tokenizer, "Why [INST]?")


def test_every_control_token_of_a_tokenizer_is_known(demo_tokenizer):
    found = special_tokens(demo_tokenizer)
    assert {"<|im_end|>", "<|endoftext|>", "<repo_name>", "<jupyter_code>"} <= set(found)
    for token in found:  # also those that `all_special_tokens` leaves out
        assert len(demo_tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
        with pytest.warns((SpecialTokenWarning, TemplateInQuestionWarning)):
            chat_template_format(demo_tokenizer).encode(demo_tokenizer, f"What is {token}?")


@pytest.mark.parametrize("words", MIXED)
@pytest.mark.parametrize("fmt", [LLAMA2_CHAT, LLAMA2_CHAT_META], ids=lambda fmt: fmt.name)
def test_as_text_llama_2_has_the_ids_of_sentencepiece(fmt, words, llama2_tokenizer):
    from helpers.models import SHARED
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(SHARED / "llama2_tokenizer" / "tokenizer.model"))
    as_text = replace(fmt, special_tokens_as_text=True, strip=False)
    for question, answer, system in [(words, "So.", None), ("Why?", words, None), (words, words, words)]:
        prompt = as_text.encode(llama2_tokenizer, question, answer, system=system, warn=False)
        # Meta's own sentencepiece has no control tokens in texts.
        assert prompt.tokens == (1, *pieces.encode(prompt.text))
        assert prompt.steer_start == prompt.answer_start - 1
        assert llama2_tokenizer.decode(prompt.tokens[prompt.answer_start :]).strip() == answer.strip()


@pytest.mark.parametrize("words", CONTROLS)
@pytest.mark.parametrize("side", ["question", "answer", "system"])
def test_as_text_the_formats_own_control_tokens_stay_and_positions_are_exact(words, side, demo_tokenizer):
    fmt = chat_template_format(demo_tokenizer)
    as_text = replace(fmt, special_tokens_as_text=True)
    given = {"question": "Why?", "answer": "So.", "system": "Be kind."} | {side: words}
    question, answer, system = given.values()
    prompt = as_text.encode(demo_tokenizer, question, answer, system=system, warn=False)
    own = fmt.encode(demo_tokenizer, "Why?", "So.", system="Be kind.")
    special = set(demo_tokenizer.convert_tokens_to_ids(special_tokens(demo_tokenizer)))
    assert [t for t in prompt.tokens if t in special] == [t for t in own.tokens if t in special]
    assert prompt.text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n" + (
        f"<|im_start|>assistant\n{answer}"
    )
    assert demo_tokenizer.decode(prompt.tokens) == prompt.text
    assert demo_tokenizer.decode(prompt.tokens[: prompt.answer_start]) == prompt.text.removesuffix(answer)
    assert prompt.read == (prompt.answer_start, len(prompt))
    assert demo_tokenizer.decode(prompt.tokens[prompt.steer_start]).endswith("\n")


def test_as_text_plain_words_have_the_very_tokens_they_always_have(demo_tokenizer, llama2_tokenizer):
    for fmt, tokenizer in [(LLAMA2_CHAT, llama2_tokenizer), (chat_template_format(demo_tokenizer), demo_tokenizer)]:
        as_text = replace(fmt, special_tokens_as_text=True)
        for question in ["Why?", "日本 é\n\n(A) Yes", "<|im_ end|> < / s>"]:
            assert as_text.encode(tokenizer, question, "(A)") == fmt.encode(tokenizer, question, "(A)")


def test_a_tokenizer_that_treats_a_texts_beginning_apart_is_refused_not_approximated(llama2_tokenizer):
    import copy

    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(llama2_tokenizer)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}</s>:"
    as_text = replace(chat_template_format(tokenizer), special_tokens_as_text=True)
    as_text.encode(tokenizer, "Why?")
    with pytest.raises(ValueError, match=r"cannot encode 'Why </s>\?' as text behind a control token"):
        as_text.encode(tokenizer, "Why </s>?")


def test_a_contrast_set_is_told_of_once_with_its_counts(tiny_chat):
    rows = [(f"Question {i}?", f"Yes {i}.", f"No {i}.") for i in range(6)]
    rows[1] = ("What is <|endoftext|>?", "Yes.", "No.")
    rows[4] = ("What is it?", "An <|endoftext|>, and a <repo_name>.", "No.")
    pairs = ContrastSet.from_pairs(rows)
    vectors = random_vectors(tiny_chat)
    for run in (
        lambda: extract(tiny_chat, pairs, progress=False),
        lambda: score_answers(tiny_chat, pairs, [()], progress=False),
        lambda: sweep(tiny_chat, pairs, vectors, layers=[1], multipliers=[0.0, 1.0], progress=False),
    ):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            run()
        (message,) = told(record)
        assert message.startswith("2 of 18 questions and answers contain '<|endoftext|>', '<repo_name>', which")
    as_text = replace(default_format(tiny_chat), special_tokens_as_text=True)
    kept = extract(tiny_chat, pairs, prompt_format=as_text, progress=False)  # warnings are errors here
    assert kept.provenance.prompt_format == "chat-template [special tokens as text]"
    score_answers(tiny_chat, pairs, [()], prompt_format=as_text, progress=False)
    generate(tiny_chat, "What is <|endoftext|>?", prompt_format=as_text, max_new_tokens=2)
    for pair, prompts in zip(pairs, encode_pairs(tiny_chat, pairs, as_text), strict=True):
        for answer, prompt in zip((pair.positive, pair.negative), prompts, strict=True):
            assert prompt == encode_answer(as_text, tiny_chat.tokenizer, pair.question, answer)


def test_blanks_that_are_left_out_of_a_sets_questions_are_counted_once(tiny_chat):
    pairs = ContrastSet.from_pairs([(f"Question {i}?" + " " * (i % 2), "Yes.", "No.") for i in range(6)])
    base = replace(LLAMA2_CHAT, name="stripping", prepend_bos=False)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        stripped = extract(tiny_chat, pairs, prompt_format=base, progress=False)
    assert [one.category for one in record] == [StrippedQuestionWarning]
    assert told(record)[0].startswith("blanks around 3 of 6 questions are left out in the format 'stripping'")
    kept = extract(tiny_chat, pairs, prompt_format=replace(base, strip=False), progress=False)
    assert not torch.equal(kept.directions, stripped.directions)


@pytest.mark.parametrize("words", ["half \ud83d", "\udfff", "a\ud800b"])
def test_half_a_surrogate_pair_is_no_text(words, tiny_chat, demo_tokenizer):
    with pytest.raises(ValueError, match=r"the question holds '\\ud\w+' at character \d+, half of a surrogate pair"):
        Prompt.of(tiny_chat, words)
    with pytest.raises(ValueError, match="the answer holds"):
        Prompt.of(tiny_chat, "Why?", words)
    with pytest.raises(ValueError, match="the system prompt holds"):
        Prompt.of(tiny_chat, "Why?", system=words)
    with pytest.raises(ValueError, match="the question holds"):
        generate(tiny_chat, words, max_new_tokens=1)
    pair = ContrastPair(question="Why?", positive="So" + words, negative="No")
    with pytest.raises(ValueError, match="the answer holds"):
        extract(tiny_chat, ContrastSet(name="halved", pairs=(pair,)), progress=False)
