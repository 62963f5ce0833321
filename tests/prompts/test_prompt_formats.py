"""Prompts are the paper's to the token: ids, one BOS, where steering starts, where the answer is, what is read."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.models import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding, ByT5Tokenizer, PreTrainedTokenizerFast

from caa_lens.prompts.batches import check_fits, left_pad
from caa_lens.prompts.prompt_formats import (
    FORMATS,
    LLAMA2_BASE,
    LLAMA2_CHAT,
    LLAMA2_CHAT_META,
    Prompt,
    PromptFormat,
    chat_template_format,
    default_format,
    encode_answer,
    encode_letters,
    resolve_format,
)
from caa_lens.prompts.token_table import explain
from caa_lens.prompts.users_words import (
    GuessedFormatWarning,
    StrippedQuestionWarning,
    TemplateInQuestionWarning,
)

# Questions that hold marks of a format are asked on purpose here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::caa_lens.prompts.users_words.TemplateInQuestionWarning"),
    pytest.mark.filterwarnings(
        "ignore::caa_lens.prompts.users_words.StrippedQuestionWarning"
    ),  # so do blanks around them
]

BOS, LETTER_A, LETTER_B, SPACE_BRACKET, CLOSE, SPACE = 1, 29909, 29933, 313, 29897, 29871
END_INST = [518, 29914, 25580, 29962]
RESPONSE = [13, 5103, 29901]  # "\nResponse:" inside a text
TOKENIZER_MODEL = SHARED / "llama2_tokenizer" / "tokenizer.model"

QUESTIONS = [
    "How are you?",
    "naïve café — “quoted”",
    "日本語のテキストは？",
    "😀",
    "families 👩‍👩‍👧 and flags 🇫🇷!",
    "two\n\nparagraphs\n and an indent",
    "many    spaces   here",
    "\ttabs\tinside",
    "What does [/INST] mean?",
    "[INST] nested [/INST]",
    "Input: x\nResponse: y\nResponse:",
    "Is it (A) or (B)?\n\nChoices:\n (A) Yes\n (B) No",
    "   leading and trailing   ",
    "\n\nblank lines around\n\n",
    "é as two characters, ﬁ ligature, zero\u200bwidth, no\u00a0break",
    "carriage\r\nreturn and \u2028 separator",
    "<0x0A> is not a byte, ▁ is not a space",
]
ANSWERS = [
    "(A)",
    "(B)",
    "Certainly, 😀 right away.",
    "two\n\nparagraphs",
    "x",
    "日本",
    "I said [/INST] (A) Response: b",
]


@pytest.fixture(scope="module")
def llama():
    """Llama 2's tokenizer as `load_model` reads it from a bare tokenizer.model."""
    if not TOKENIZER_MODEL.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    from caa_lens.models.loading.tokenizers import sentencepiece_tokenizer

    return sentencepiece_tokenizer(TOKENIZER_MODEL)


@pytest.fixture(scope="module")
def pieces(llama):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(TOKENIZER_MODEL))


def bpe(*, merges=(), left_out="", bos="<s>"):
    """A fast tokenizer of single printable ASCII characters, apart from `left_out`, and of the given merges."""
    from tokenizers import Tokenizer, models

    characters = [chr(code) for code in range(32, 127) if chr(code) not in left_out]
    words = ["<unk>", "<s>", "\n", *characters, *("".join(merge) for merge in merges)]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, unk_token="<unk>")


def prompt_of(n, *, steer_start=0, text="a text", first=10):
    return Prompt(
        text=text,
        tokens=tuple(range(first, first + n)),
        steer_start=steer_start,
        answer_start=n - 1,
        read=(n - 1, n),
    )


# ---- Llama 2, with its real tokenizer -------------------------------------------------------------------------


def test_a_chat_prompt_with_a_letter_has_the_papers_token_ids(llama2_tokenizer, llama):
    expected = (BOS, 518, 25580, 29962, 1128, 526, 366, 29973, *END_INST, SPACE_BRACKET, LETTER_A, CLOSE)
    for tokenizer in (llama2_tokenizer, llama):
        prompt = encode_answer(LLAMA2_CHAT, tokenizer, "How are you?", "(A)")
        assert prompt.text == "[INST] How are you? [/INST] (A)"
        assert prompt.tokens == expected
        assert (prompt.steer_start, prompt.answer_start, prompt.read) == (11, 12, (13, 14))


def test_a_base_prompt_with_a_letter_has_the_papers_token_ids(llama2_tokenizer, llama):
    expected = (BOS, 10567, 29901, 1128, 526, 366, 29973, *RESPONSE, SPACE_BRACKET, LETTER_B, CLOSE)
    for tokenizer in (llama2_tokenizer, llama):
        prompt = encode_answer(LLAMA2_BASE, tokenizer, "How are you?", "(B)")
        assert prompt.text == "Input: How are you?\nResponse: (B)"
        assert prompt.tokens == expected
        assert (prompt.steer_start, prompt.answer_start, prompt.read) == (9, 10, (11, 12))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("system", [None, "Be kind.", "Sei höflich 🙂,\nimmer."])
def test_ids_are_sentencepieces_own_behind_exactly_one_bos(name, system, llama, pieces):
    for question in QUESTIONS:
        for answer in ["", "(", *ANSWERS]:
            prompt = encode_answer(FORMATS[name], llama, question, answer, system=system)
            assert prompt.tokens == (BOS, *pieces.encode(prompt.text)), (question, answer)
            assert prompt.tokens.count(BOS) == 1


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    question=st.text(alphabet="ab [](/)INSTRespon:.\n\té日😀", min_size=1, max_size=30).filter(str.strip),
    answer=st.text(alphabet="ab ([/INST])\né日😀", min_size=1, max_size=12).filter(str.strip),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_any_text_is_cut_where_the_template_says(question, answer, name, llama, pieces):
    bare = FORMATS[name].encode(llama, question)
    prompt = encode_answer(FORMATS[name], llama, question, answer)
    assert prompt.tokens == (BOS, *pieces.encode(prompt.text))
    assert prompt.tokens[: prompt.steer_start + 1] == bare.tokens  # the instruction, encoded on its own
    assert prompt.answer_start == prompt.steer_start + 1
    assert pieces.decode(list(prompt.tokens[prompt.answer_start :])).endswith(answer)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("fmt", [LLAMA2_CHAT, LLAMA2_CHAT_META], ids=lambda fmt: fmt.name)
def test_steering_starts_at_the_last_token_of_the_last_inst(fmt, question, llama):
    for answer in ["", "(", *ANSWERS]:
        prompt = encode_answer(fmt, llama, question, answer, system="Be kind.")
        tokens = list(prompt.tokens)
        # The marker's last occurrence in front of the answer, found as the paper's authors do it.
        ends = [i + 3 for i in range(prompt.answer_start) if tokens[i : i + 4] == END_INST]
        assert prompt.steer_start == ends[-1]
        assert prompt.answer_start == ends[-1] + 1


@pytest.mark.parametrize("question", QUESTIONS)
def test_steering_a_base_prompt_starts_at_the_colon_of_its_own_response(question, llama):
    for answer in ["", "(", *ANSWERS]:
        prompt = encode_answer(LLAMA2_BASE, llama, question, answer)
        tokens = list(prompt.tokens)
        ends = [i + 2 for i in range(prompt.answer_start) if tokens[i : i + 3] == RESPONSE]
        assert prompt.steer_start == ends[-1]
        assert prompt.answer_start == ends[-1] + 1


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_letter_answer_the_second_to_last_token_is_read(name, llama):
    for question in QUESTIONS:
        for answer, letter in [("(A)", LETTER_A), ("(B)", LETTER_B)]:
            prompt = encode_answer(FORMATS[name], llama, question, answer)
            assert prompt.read == (len(prompt) - 2, len(prompt) - 1)
            assert prompt.tokens[-3:] == (SPACE_BRACKET, letter, CLOSE)


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_completion_every_token_is_read_and_no_other(name, llama, pieces):
    for question in QUESTIONS:
        for answer in ANSWERS[2:]:
            prompt = encode_answer(FORMATS[name], llama, question, answer)
            assert pieces.decode(list(prompt.tokens[slice(*prompt.read)])) == answer
            # The blank between is a token of its own in front of some answers, and not a word of theirs.
            separator = prompt.tokens[prompt.answer_start : prompt.read[0]]
            assert separator == ((SPACE,) if answer[0] in "日" else ())
            assert prompt.read[1] == len(prompt)


def test_of_a_prompt_without_an_answer_the_last_token_is_read(demo_tokenizer):
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, "How was your day?")
    assert prompt.read == (len(prompt) - 1, len(prompt))
    assert prompt.answer_start == len(prompt)


def test_three_characters_in_brackets_alone_are_a_letter(llama):
    for answer in ["(A) ", "(AB)", "[A]", "A", "A))"]:
        prompt = encode_answer(LLAMA2_CHAT, llama, "Which?", answer)
        assert prompt.read == (prompt.answer_start, len(prompt)), answer


def test_blanks_around_a_question_do_not_count_in_the_authors_formats_which_is_said(llama):
    for fmt in FORMATS.values():
        with pytest.warns(StrippedQuestionWarning, match=f"blanks around the question .* '{fmt.name}'"):
            stripped = fmt.encode(llama, " \n Why? \t")
        assert stripped == fmt.encode(llama, "Why?")


def test_a_format_of_the_callers_own_takes_the_question_character_for_character(llama, pieces):
    as_it_is = PromptFormat(name="mine", render=lambda question, system: question, separator="", prepend_bos=True)
    kept = replace(LLAMA2_CHAT, strip=False)
    for question in ["  [INST] Why? [/INST] ", "\n\nA text that goes on", "Dear diary,\n", "two  blanks  "]:
        prompt = as_it_is.encode(llama, question, warn=False)
        assert prompt.text == question
        assert prompt.tokens == (BOS, *pieces.encode(question))
        assert kept.encode(llama, question, warn=False).text == f"[INST] {question} [/INST]"


def test_the_authors_put_the_system_prompt_before_the_instruction_and_meta_inside(llama):
    def text(fmt, system):
        return fmt.encode(llama, "Why?", "(A)", system=system).text

    assert text(LLAMA2_CHAT, "Be kind.") == "<<SYS>>\nBe kind.\n<</SYS>>\n\n[INST] Why? [/INST] (A)"
    assert text(LLAMA2_CHAT_META, "Be kind.") == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhy? [/INST] (A)"
    assert text(LLAMA2_BASE, "Be kind.") == "Be kind.\n\nInput: Why?\nResponse: (A)"
    assert text(LLAMA2_CHAT, None) == text(LLAMA2_CHAT_META, None) == "[INST] Why? [/INST] (A)"


def test_a_system_prompt_moves_every_position_by_the_tokens_it_adds(llama):
    for fmt in FORMATS.values():
        without = encode_answer(fmt, llama, "How are you?", "(A)")
        with_it = encode_answer(fmt, llama, "How are you?", "(A)", system="Say [/INST] and Response: often.")
        added = len(with_it) - len(without)
        assert added > 0
        assert with_it.steer_start == without.steer_start + added
        assert with_it.answer_start == without.answer_start + added
        assert with_it.read == (without.read[0] + added, without.read[1] + added)


def test_letters_have_the_ids_of_the_bare_letters(llama, pieces):
    for fmt in FORMATS.values():
        for question in QUESTIONS:
            prompt, ids = encode_letters(fmt, llama, question, ("A", "B"))
            assert ids == (LETTER_A, LETTER_B) == (pieces.piece_to_id("A"), pieces.piece_to_id("B"))
            assert prompt.tokens[-1] == SPACE_BRACKET
            assert prompt.text.endswith(" (")


def test_the_scored_prompt_is_the_beginning_of_both_full_answers(llama, demo_tokenizer):
    template = chat_template_format(demo_tokenizer)
    for fmt, tokenizer in [*((fmt, llama) for fmt in FORMATS.values()), (template, demo_tokenizer)]:
        prompt, ids = encode_letters(fmt, tokenizer, QUESTIONS[11], ("A", "B"), system="Be kind.")
        for letter, token in zip("AB", ids, strict=True):
            full = encode_answer(fmt, tokenizer, QUESTIONS[11], f"({letter})", system="Be kind.")
            assert full.tokens[:-2] == prompt.tokens
            assert full.tokens[-2] == token
            assert full.steer_start == prompt.steer_start


# ---- chat templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_chat_template_ids_are_the_tokenizers_own_and_bos_is_not_doubled(system, demo_tokenizer):
    fmt = chat_template_format(demo_tokenizer)
    for question in QUESTIONS:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        own = demo_tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        own = own["input_ids"] if isinstance(own, BatchEncoding) else own
        prompt = fmt.encode(demo_tokenizer, question, system=system)
        assert prompt.tokens == tuple(own)
        assert prompt.tokens[0] == demo_tokenizer.bos_token_id != prompt.tokens[1]
        assert prompt.steer_start == len(own) - 1


def test_behind_a_chat_template_the_answer_follows_the_generation_prompt(demo_tokenizer):
    fmt = chat_template_format(demo_tokenizer)
    for question in QUESTIONS:
        generation_prompt = fmt.encode(demo_tokenizer, question).tokens
        for answer in ANSWERS:
            prompt = encode_answer(fmt, demo_tokenizer, question, answer)
            own = demo_tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert prompt.tokens == (*generation_prompt, *own)
            assert prompt.steer_start == len(generation_prompt) - 1
            assert prompt.answer_start == len(generation_prompt)
            letter = (len(prompt) - 2, len(prompt) - 1)
            assert prompt.read == (letter if answer in ("(A)", "(B)") else (prompt.answer_start, len(prompt)))


def test_a_template_is_asked_of_a_tokenizer_that_has_one():
    for tokenizer in (bpe(), None):
        with pytest.raises(ValueError, match=r"no chat template: use prompts\.LLAMA2_BASE"):
            chat_template_format(tokenizer)


# ---- other tokenizers -----------------------------------------------------------------------------------------


def test_a_tokenizer_that_merges_bracket_and_letter_cannot_score_letters():
    with pytest.raises(ValueError, match=r"'\(A\)' is tokenized as .*'\(A'.*use full completions"):
        encode_letters(LLAMA2_BASE, bpe(merges=[("(", "A")]), "Which?", ("A", "B"))


def test_a_tokenizer_that_merges_letter_and_bracket_cannot_score_letters():
    # The letter alone would be another token than the one that extraction reads.
    prompt = encode_answer(LLAMA2_BASE, bpe(merges=[("A", ")")]), "Which?", "(A)")
    assert prompt.read == (len(prompt) - 1, len(prompt))
    tokenizer = bpe(merges=[(" ", "("), (" (", "B")])
    with pytest.raises(ValueError, match=r"'\(B\)' is tokenized as"):
        encode_letters(LLAMA2_BASE, tokenizer, "Which?", ("A", "B"))


def test_letters_of_several_tokens_cannot_be_scored():
    with pytest.raises(ValueError, match=r"'\(AB\)' is tokenized as .*one token for the letter"):
        encode_letters(LLAMA2_BASE, bpe(), "Which?", ("A", "AB"))


def test_letters_that_a_tokenizer_does_not_tell_apart_cannot_be_scored():
    with pytest.raises(ValueError, match=r"\('A', 'B'\) have token ids \[0, 0\], expected distinct ones"):
        encode_letters(LLAMA2_BASE, bpe(left_out="AB"), "Which?", ("A", "B"))


def test_a_tokenizer_without_merges_scores_letters():
    tokenizer = bpe()
    prompt, ids = encode_letters(LLAMA2_BASE, tokenizer, "Which?", ("A", "B"))
    assert ids == tuple(tokenizer.convert_tokens_to_ids(["A", "B"]))
    assert len(prompt) == 1 + len("Input: Which?\nResponse: (")  # a token a character, and BOS


def test_steering_starts_at_the_last_token_of_a_last_character_that_has_several(llama):
    fmt = PromptFormat(name="smile", render=lambda q, system: f"{q} 😀", separator=" ", prepend_bos=True)
    for question in ["Why?", "Why 😀?"]:
        alone = fmt.encode(llama, question)
        prompt = encode_answer(fmt, llama, question, "because")
        assert alone.steer_start == len(alone) - 1
        assert prompt.tokens[: prompt.steer_start + 1] == alone.tokens


def test_blanks_at_an_instructions_end_are_not_where_steering_starts(llama):
    fmt = PromptFormat(name="blank", render=lambda q, system: f"Q: {q}\nA:  ", separator="", prepend_bos=True)
    prompt = fmt.encode(llama, "Why?", "So.")
    assert llama.convert_ids_to_tokens(prompt.tokens[prompt.steer_start]) == ":"
    assert prompt.steer_start > list(prompt.tokens).index(29901)  # the colon of A, not of Q


def test_a_missing_tokenizer_is_said():
    with pytest.raises(TypeError, match="this model has no tokenizer: load it from a folder"):
        LLAMA2_CHAT.encode(None, "Why?")


def test_a_tokenizer_without_character_offsets_is_refused():
    with pytest.raises(TypeError, match=r"ByT5Tokenizer gives no character offsets.*load the fast tokenizer"):
        LLAMA2_CHAT.encode(ByT5Tokenizer(), "Why?")


def test_a_format_with_bos_is_refused_for_a_tokenizer_that_has_none():
    with pytest.raises(ValueError, match=r"'llama2-base' starts with BOS.*prepend_bos=False"):
        LLAMA2_BASE.encode(bpe(bos=None), "Why?")


def test_a_prompt_of_a_model_is_what_its_format_makes(tiny_chat):
    chat = chat_template_format(tiny_chat.tokenizer)
    made = Prompt.of(tiny_chat, "How are you?", "Well", system="Be brief.")
    assert made == chat.encode(tiny_chat.tokenizer, "How are you?", "Well", system="Be brief.")
    base = Prompt.of(tiny_chat, "How are you?", prompt_format=LLAMA2_BASE)
    assert base.text == "Input: How are you?\nResponse:"


def test_a_question_that_is_in_its_format_already_is_told_of(tiny_chat, llama):
    asked = Prompt.of(tiny_chat, "How are you?")
    with pytest.warns(TemplateInQuestionWarning, match=r"contains '<\|im_start\|>', '<\|im_end\|>', marks of the"):
        twice = Prompt.of(tiny_chat, asked.text)
    assert len(twice) > len(asked)
    with pytest.warns(TemplateInQuestionWarning, match=r"contains '\[INST\]', a mark of the format 'llama2-chat'"):
        LLAMA2_CHAT.encode(llama, "[INST] How are you? [/INST]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLAMA2_BASE.encode(llama, "What does [INST] mean?")


@pytest.mark.parametrize("question", ["", "   ", "\n\t "])
def test_an_empty_question_is_refused(question):
    with pytest.raises(ValueError, match="the question is empty"):
        LLAMA2_CHAT.encode(bpe(), question)


# ---- batches --------------------------------------------------------------------------------------------------


def test_left_padding_puts_every_prompt_at_the_right_edge_and_moves_its_positions():
    prompts = [prompt_of(5, steer_start=3), prompt_of(2, steer_start=0, first=50), prompt_of(7, steer_start=6)]
    batch = left_pad(prompts, n_ctx=7)
    assert batch.padding.tolist() == [2, 5, 0]
    assert batch.steer_start.tolist() == [5, 5, 6]
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        assert batch.tokens[row, -n:].tolist() == list(prompt.tokens)
        assert batch.attention_mask[row].tolist() == [False] * (7 - n) + [True] * n
        assert batch.tokens[row, batch.steer_start[row]] == prompt.tokens[prompt.steer_start]


def test_prompts_of_one_length_are_not_padded():
    batch = left_pad([prompt_of(4), prompt_of(4, first=30)], n_ctx=10)
    expected = torch.tensor([[10, 11, 12, 13], [30, 31, 32, 33]])
    torch.testing.assert_close(batch.tokens, expected, rtol=0, atol=0)
    assert batch.attention_mask.all()


def test_no_prompts_and_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no prompts given"):
        left_pad([], n_ctx=8)
    with pytest.raises(ValueError, match="the prompt has 9 tokens, but the model's context is 8"):
        left_pad([prompt_of(3), prompt_of(9)], n_ctx=8)
    with pytest.raises(ValueError, match="7 tokens and 2 to generate"):
        left_pad([prompt_of(7)], n_ctx=8, room=2)


def test_a_prompt_may_fill_the_context_with_its_room_and_not_exceed_it():
    check_fits(prompt_of(8), 8)
    check_fits(prompt_of(6), 8, room=2)
    long = prompt_of(7, text="It was a dark " + "and very " * 20 + "stormy night")
    with pytest.raises(ValueError) as error:
        check_fits(long, 8, room=2)
    said = str(error.value)
    assert "7 tokens and 2 to generate, but the model's context is 8: shorten it" in said
    assert repr(long.text[-80:]) in said
    assert "It was" not in said


# ---- what is read, what is steered ----------------------------------------------------------------------------


def marks(table):
    """`(position, id) -> marks` of an explained prompt's rows, without its two lines of head and its foot."""
    rows = [line.split() for line in table.splitlines()[2:-1]]
    return {(int(row[0]), int(row[1])): [w for w in row[2:] if w in ("read", "steered")] for row in rows}


def test_explain_marks_what_is_read_and_what_is_steered(demo_tokenizer):
    prompt = encode_answer(chat_template_format(demo_tokenizer), demo_tokenizer, "Why?", "(A)")
    found = marks(explain(prompt, demo_tokenizer))
    assert list(found) == list(enumerate(prompt.tokens))
    assert explain(prompt, demo_tokenizer).startswith("format: chat-template\n")
    n = len(prompt)
    expected = [[]] * (n - 4) + [["steered"], ["steered"], ["read", "steered"], ["steered"]]
    assert list(found.values()) == expected


def test_explain_marks_a_whole_completion_as_read():
    prompt = encode_answer(LLAMA2_BASE, bpe(), "Why", "So it is")
    found = list(marks(explain(prompt, bpe())).values())
    assert found[-8:] == [["read", "steered"]] * 8
    assert found[-10:-8] == [["steered"]] * 2  # the colon, and the blank in front of the completion
    assert not any(found[:-10])


def test_explain_reads_nothing_of_a_prompt_without_an_answer():
    prompt = LLAMA2_BASE.encode(bpe(), "Why?")
    table = explain(prompt, bpe())
    assert list(marks(table).values()) == [[]] * (len(prompt) - 1) + [["steered"]]
    assert table.splitlines()[-1] == "and every generated token is steered"


# ---- which format ---------------------------------------------------------------------------------------------


def model_named(name, tokenizer=None, tokenizer_name=None):
    return SimpleNamespace(cfg=SimpleNamespace(model_name=name, tokenizer_name=tokenizer_name), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", LLAMA2_CHAT),
        ("meta-llama/Llama-2-13b-chat-hf", LLAMA2_CHAT),
        ("NousResearch/Llama-2-70b-chat-hf", LLAMA2_CHAT),
        ("meta-llama/Llama-2-7b-chat", LLAMA2_CHAT),
        ("meta-llama/Llama-2-13b-hf", LLAMA2_BASE),
        ("meta-llama/Llama-2-7b", LLAMA2_BASE),
    ],
)
def test_without_a_template_llama_2_gets_its_own_format_by_its_hub_id(name, expected):
    assert default_format(model_named(name, bpe())) is expected
    # TransformerLens' own loading cuts the owner off one of its two names.
    assert default_format(model_named(name.split("/")[1], bpe(), tokenizer_name=name)) is expected


@pytest.mark.parametrize("name", ["Llama-2-7b-chat-hf", "llama2-chat", "someone/llama-2-7b-guanaco", "a/Llama-2-chat"])
def test_a_folders_name_and_another_models_id_decide_nothing(name):
    with pytest.warns(GuessedFormatWarning, match=rf"nothing says how '{name}' is prompted.*'llama2-base' was chosen"):
        assert default_format(model_named(name, bpe())) == LLAMA2_BASE


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-hf", "llama-2"])
def test_a_template_of_its_own_wins_over_a_name(name, demo_tokenizer):
    assert default_format(model_named(name, demo_tokenizer)).name == "chat-template"


def test_another_chat_model_gets_its_tokenizers_template(demo_model):
    assert default_format(demo_model).name == "chat-template"
    assert "<|im_start|>user\nWhy?<|im_end|>" in default_format(demo_model).render("Why?", None)


def test_without_a_template_the_base_format_is_used_with_bos_only_if_there_is_one():
    with pytest.warns(GuessedFormatWarning):
        with_bos = default_format(model_named("gpt", bpe()))
    with pytest.warns(GuessedFormatWarning):
        without = default_format(model_named("gpt", bpe(bos=None)))
    assert with_bos.name == without.name == "llama2-base"
    assert with_bos.encode(bpe(), "Why?").tokens[0] == 1
    bare = without.encode(bpe(bos=None), "Why?")
    assert len(bare) == len("Input: Why?\nResponse:")
    assert with_bos.encode(bpe(), "Why?").tokens[1:] == bare.tokens


def test_a_format_can_be_given_by_name_as_such_or_left_to_the_model(demo_model):
    for fmt in FORMATS.values():
        assert resolve_format(demo_model, fmt.name) is fmt
        assert resolve_format(demo_model, fmt) is fmt
    assert resolve_format(demo_model, "chat-template").name == "chat-template"
    assert resolve_format(demo_model, None).name == "chat-template"
    assert resolve_format(model_named("meta-llama/Llama-2-7b-chat-hf"), None) is LLAMA2_CHAT


def test_an_unknown_format_is_refused_with_the_known_ones(demo_model):
    with pytest.raises(ValueError, match=r"'llama3'.*llama2-chat, llama2-chat-meta, llama2-base, chat-template"):
        resolve_format(demo_model, "llama3")
    with pytest.raises(ValueError, match="no chat template"):
        resolve_format(model_named("gpt", bpe()), "chat-template")


# ---- options ----------------------------------------------------------------------------------------------------


def test_options_other_than_the_defaults_are_part_of_the_name():
    later = replace(LLAMA2_CHAT, start_offset=1)
    both = replace(later, special_tokens_as_text=True)
    assert later.name == "llama2-chat [start_offset=1]"
    assert both.name == "llama2-chat [start_offset=1, special tokens as text]"
    assert replace(both, special_tokens_as_text=False).name == later.name
    assert replace(later, start_offset=0) == LLAMA2_CHAT


def test_with_an_offset_steering_starts_one_token_later_and_nothing_else_moves(llama):
    for fmt in FORMATS.values():
        for answer in ["", "(", "(A)", "Certainly."]:
            usual = encode_answer(fmt, llama, "How are you?", answer)
            later = encode_answer(replace(fmt, start_offset=1), llama, "How are you?", answer)
            assert later == replace(usual, steer_start=usual.steer_start + 1)


@pytest.mark.parametrize("offset", [-1, 2, True])
def test_other_offsets_are_refused(offset):
    with pytest.raises(ValueError, match=r"start_offset=.*expected 0 .* or 1 "):
        replace(LLAMA2_CHAT, start_offset=offset)
