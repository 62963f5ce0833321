"""Conversations as prompts: the template's own tokens, Meta's layout of turns, and where steering starts in them."""

import copy
import warnings
from dataclasses import replace

import pytest
from helpers.models import SHARED
from helpers.templates import LLAMA2_TEMPLATE

from caa_lens.contrast.messages import as_question
from caa_lens.prompts.checks import as_prompt, listed
from caa_lens.prompts.prompt_formats import (
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
from caa_lens.prompts.users_words import SpecialTokenWarning, StrippedQuestionWarning

BOS, EOS = 1, 2
SYSTEM = {"role": "system", "content": "Sei höflich 🙂,\nimmer."}
TURNS = [
    {"role": "user", "content": "Hi. Who are you?"},
    {"role": "assistant", "content": "I am\n\na model: user <- assistant."},
    {"role": "user", "content": "日本語 (A)?\n\nChoices:\n (A) Yes\n (B) No"},
    {"role": "assistant", "content": "(A)"},
    {"role": "user", "content": "Why?"},
]
TALKS = [TURNS[:3], TURNS, [SYSTEM, *TURNS[:1]], [SYSTEM, *TURNS[:3]], [SYSTEM, *TURNS]]
ids = lambda talk: f"{len(talk)}" if isinstance(talk, list) else None  # noqa: E731


def template_tokens(tokenizer, talk):
    encoded = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=True)
    return list(encoded["input_ids"] if hasattr(encoded, "keys") else encoded)


@pytest.fixture(scope="module")
def pieces():
    file = SHARED / "llama2_tokenizer" / "tokenizer.model"
    if not file.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(file))


@pytest.fixture
def llama2_with_template(llama2_tokenizer):
    tokenizer = copy.deepcopy(llama2_tokenizer)
    tokenizer.chat_template = LLAMA2_TEMPLATE
    return tokenizer


# ---- the template's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_the_tokens_are_the_templates_own(talk, demo_tokenizer, llama2_with_template):
    for tokenizer in (demo_tokenizer, llama2_with_template):
        prompt = chat_template_format(tokenizer).encode(tokenizer, talk)
        assert list(prompt.tokens) == template_tokens(tokenizer, talk)
        assert prompt.text == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert prompt.answer_start == len(prompt)


@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_steering_starts_at_the_last_token_of_the_generation_prompt(talk, demo_tokenizer):
    """The slow twin: what a conversation has behind the last turn's end is the generation prompt."""
    fmt = chat_template_format(demo_tokenizer)
    prompt = fmt.encode(demo_tokenizer, talk, "Because.")
    closed = demo_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=False)
    whole = demo_tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(closed)
    # The last token of "<|im_start|>assistant\n" that is no blank at the end is the line's.
    n = len(demo_tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert prompt.steer_start == n - 1
    assert prompt.answer_start == n
    assert demo_tokenizer.decode(prompt.tokens[n:]) == "Because."
    assert demo_tokenizer.decode(prompt.tokens[:n]) == whole


def test_a_lone_question_in_a_list_is_the_plain_question(demo_tokenizer, llama2_tokenizer):
    for fmt, tokenizer in (
        (chat_template_format(demo_tokenizer), demo_tokenizer),
        (LLAMA2_CHAT, llama2_tokenizer),
        (LLAMA2_CHAT_META, llama2_tokenizer),
        (LLAMA2_BASE, llama2_tokenizer),
    ):
        plain = fmt.encode(tokenizer, "Why?", "(A)", system="Be kind.")
        asked = [{"role": "user", "content": "Why?"}]
        assert fmt.encode(tokenizer, asked, "(A)", system="Be kind.") == plain
        assert fmt.encode(tokenizer, [{"role": "system", "content": "Be kind."}, *asked], "(A)") == plain


@pytest.mark.parametrize("talk", TALKS[:2], ids=ids)
def test_a_system_prompt_may_be_given_beside_messages_without_one(talk, demo_tokenizer, llama2_tokenizer):
    for fmt, tokenizer in ((chat_template_format(demo_tokenizer), demo_tokenizer), (LLAMA2_CHAT, llama2_tokenizer)):
        beside = fmt.encode(tokenizer, talk, system=SYSTEM["content"])
        assert beside == fmt.encode(tokenizer, [SYSTEM, *talk])
        assert beside.turns == fmt.encode(tokenizer, [SYSTEM, *talk]).turns
        with pytest.raises(ValueError, match=r"got system='Be kind.' beside the message of the system 'Sei"):
            fmt.encode(tokenizer, [SYSTEM, *talk], system="Be kind.")


# ---- Llama 2's -------------------------------------------------------------------------------------------------


def metas_tokens(pieces, talk):
    """Meta's `chat_completion`: the system prompt inside of the first turn, BOS and EOS around each exchange."""
    if talk[0]["role"] == "system":
        first = f"<<SYS>>\n{talk[0]['content']}\n<</SYS>>\n\n{talk[1]['content']}"
        talk = [{"role": "user", "content": first}, *talk[2:]]
    tokens = []
    for asked, said in zip(talk[::2], talk[1::2], strict=False):
        text = f"[INST] {asked['content'].strip()} [/INST] {said['content'].strip()} "
        tokens += [BOS, *pieces.encode(text), EOS]
    return [*tokens, BOS, *pieces.encode(f"[INST] {talk[-1]['content'].strip()} [/INST]")]


@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_turns_of_llama_2_are_metas_to_the_token(talk, llama2_tokenizer, llama2_with_template, pieces):
    prompt = LLAMA2_CHAT_META.encode(llama2_tokenizer, talk)
    assert list(prompt.tokens) == metas_tokens(pieces, talk) == template_tokens(llama2_with_template, talk)
    assert prompt.tokens.count(EOS) == len([m for m in talk if m["role"] == "assistant"])


@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_the_authors_format_differs_in_the_place_of_the_system_prompt_alone(talk, llama2_tokenizer, pieces):
    prompt = LLAMA2_CHAT.encode(llama2_tokenizer, talk)
    if talk[0] is not SYSTEM:
        assert list(prompt.tokens) == metas_tokens(pieces, talk)
        return
    told = f"<<SYS>>\n{SYSTEM['content']}\n<</SYS>>\n\n"
    metas = LLAMA2_CHAT_META.encode(llama2_tokenizer, talk)
    assert prompt.text == metas.text.replace(f"[INST] {told}", f"{told}[INST] ", 1)
    assert prompt.tokens.count(BOS) == metas.tokens.count(BOS)
    # Whatever comes behind the first exchange is Meta's to the token.
    behind = [i for i, token in enumerate(prompt.tokens) if token == BOS][1:]
    if behind:
        there = [i for i, token in enumerate(metas.tokens) if token == BOS][1:]
        assert prompt.tokens[behind[0] :] == metas.tokens[there[0] :]


@pytest.mark.parametrize("fmt", [LLAMA2_CHAT, LLAMA2_CHAT_META], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_steering_starts_at_the_last_inst_of_the_last_turn(talk, fmt, llama2_tokenizer, pieces):
    end = [518, 29914, 25580, 29962]
    for answer in ("", "(A)", "Sure [/INST] 日本"):
        prompt = encode_answer(fmt, llama2_tokenizer, talk, answer)
        ends = [i + 3 for i in range(prompt.answer_start) if list(prompt.tokens[i : i + 4]) == end]
        assert len(ends) == sum(message["role"] == "user" for message in talk)
        assert prompt.steer_start == ends[-1] == prompt.answer_start - 1
    assert fmt.encode(llama2_tokenizer, talk, "(A)").tokens[:-3] == fmt.encode(llama2_tokenizer, talk).tokens


def test_letters_of_a_conversation_are_read_and_scored_where_those_of_a_question_are(llama2_tokenizer, demo_tokenizer):
    talk = [SYSTEM, *TURNS[:3]]
    read = encode_answer(LLAMA2_CHAT, llama2_tokenizer, talk, "(B)")
    assert read.read == (len(read) - 2, len(read) - 1)
    assert read.tokens[read.read[0]] == 29933
    for fmt, tokenizer in (
        (LLAMA2_CHAT, llama2_tokenizer),
        (chat_template_format(demo_tokenizer), demo_tokenizer),
    ):
        opened, letters = encode_letters(fmt, tokenizer, talk, ("A", "B"))
        alone, same = encode_letters(fmt, tokenizer, TURNS[2]["content"], ("A", "B"))
        assert letters == same
        assert opened.tokens[opened.steer_start :] == alone.tokens[alone.steer_start :]


def test_blanks_around_turns_of_llama_2_are_left_out_which_is_said(llama2_tokenizer):
    blank = [{**message, "content": f"\n {message['content']} "} for message in TURNS]
    with pytest.warns(StrippedQuestionWarning, match="blanks around the question"):
        found = LLAMA2_CHAT.encode(llama2_tokenizer, blank)
    assert found == LLAMA2_CHAT.encode(llama2_tokenizer, TURNS)
    kept = replace(LLAMA2_CHAT, strip=False).encode(llama2_tokenizer, blank)
    assert all(message["content"] in kept.text for message in blank)


def test_marks_of_control_tokens_in_any_turn_are_told_or_kept_as_text(llama2_tokenizer):
    as_text = replace(LLAMA2_CHAT, special_tokens_as_text=True)
    for turn in range(3):
        talk = [dict(message) for message in TURNS[:3]]
        talk[turn]["content"] = "Say </s><s> now."
        with pytest.warns(SpecialTokenWarning, match="the words contain '<s>', '</s>'|'</s>'"):
            LLAMA2_CHAT.encode(llama2_tokenizer, talk)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prompt = as_text.encode(llama2_tokenizer, talk)
        assert (prompt.tokens.count(BOS), prompt.tokens.count(EOS)) == (2, 1)  # the layout's own
        assert prompt.text == as_text.encode(llama2_tokenizer, talk, warn=False).text


def test_a_tokenizer_without_bos_and_eos_has_no_layout_of_turns(llama2_tokenizer):
    bare = copy.deepcopy(llama2_tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match="writes BOS and EOS between turns, and this tokenizer has not both"):
        LLAMA2_CHAT.encode(bare, TURNS)


@pytest.mark.parametrize(
    "roles", [("user", "user"), ("assistant", "user"), ("user", "system", "user"), ("user", "assistant", "tool")]
)
def test_what_llama_2_has_no_place_for_is_refused_by_its_format_and_by_its_template(
    roles, llama2_tokenizer, llama2_with_template
):
    talk = [{"role": role, "content": f"words {n}"} for n, role in enumerate(roles)]
    with pytest.raises(ValueError, match=f"got messages of {', '.join(roles)}: Llama 2's format takes perhaps one"):
        LLAMA2_CHAT.encode(llama2_tokenizer, talk)
    with pytest.raises(ValueError, match=r"chat template (failed on messages of|drops or changes)"):
        chat_template_format(llama2_with_template).encode(llama2_with_template, talk)


# ---- templates that lose something ------------------------------------------------------------------------------

EVERY = "{% for m in messages %}<{{ ROLE }}>{{ WORDS }}\n{% endfor %}<assistant>"


def templated(tokenizer, *, role="m.role", words="m.content"):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = EVERY.replace("ROLE", role).replace("WORDS", words)
    return tokenizer, chat_template_format(tokenizer)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("m.content if m.role == 'user' else ''", "words of the assistant in message 2"),
        ("m.content if loop.last else m.content[:9]", "words of the user in message 1"),
        ("m.content | upper if loop.index0 == 1 else m.content", "words of the assistant in message 2"),
        ("m.content.split('<-')[-1]", "words of the assistant in message 2"),
        ("m.content | replace('日', '')", "words of the user in message 3"),
        ("m.content if loop.index0 != 1 else messages[0].content", "words of the assistant in message 2"),
    ],
)
def test_a_template_that_drops_or_changes_a_turn_is_refused(words, what, demo_tokenizer):
    tokenizer, fmt = templated(demo_tokenizer, words=words)
    with pytest.raises(ValueError, match=rf"chat template drops or changes the {what}"):
        fmt.encode(tokenizer, TURNS)
    same, fmt = templated(demo_tokenizer)
    assert fmt.encode(same, TURNS).text.count("\n<") == 5


def test_turns_that_say_the_same_are_all_there(demo_tokenizer):
    again = [TURNS[0], TURNS[1], TURNS[0], TURNS[1], TURNS[0]]
    tokenizer, fmt = templated(demo_tokenizer)
    prompt = fmt.encode(tokenizer, again)
    assert prompt.text.count(TURNS[0]["content"]) == 3
    assert len({start for _, start, _ in prompt.turns}) == 5
    tokenizer, fmt = templated(demo_tokenizer, words="m.content if loop.index0 != 2 else ''")
    with pytest.raises(ValueError, match="drops or changes the words of the user in message 3"):
        fmt.encode(tokenizer, again)


def test_a_role_that_a_template_takes_for_another_is_refused(demo_tokenizer):
    talk = [*TURNS[:2], {"role": "tool", "content": "42"}]
    tokenizer, fmt = templated(demo_tokenizer, role="m.role if m.role == 'user' else 'assistant'")
    with pytest.raises(ValueError, match="takes the role 'tool' for 'assistant': say 'assistant' if that"):
        fmt.encode(tokenizer, talk)
    tokenizer, fmt = templated(demo_tokenizer)
    assert "<tool>42" in fmt.encode(tokenizer, talk).text


def test_a_template_that_takes_no_system_prompt_says_so_of_conversations_too(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        EVERY.replace("ROLE", "m.role").replace("WORDS", "m.content")
    )
    with pytest.raises(ValueError, match=r"takes no system prompt \(TemplateError: no system\): put it into the quest"):
        chat_template_format(tokenizer).encode(tokenizer, [SYSTEM, *TURNS])


def test_a_template_may_put_a_system_prompt_where_it_likes(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = (  # as some models have it: behind all turns but the last
        "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}{% if loop.last "
        "and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}<{{ m.role }}>{{ m.content }}"
        "{% endfor %}<assistant>"
    )
    prompt = chat_template_format(tokenizer).encode(tokenizer, [SYSTEM, *TURNS[:3]])
    said = {role: tokenizer.decode(prompt.tokens[start:stop]) for role, start, stop in prompt.turns}
    assert SYSTEM["content"] in said["system"]
    assert [role for role, _, _ in sorted(prompt.turns, key=lambda turn: turn[1])] == [
        "user",
        "assistant",
        "system",
        "user",
    ]


def test_a_format_of_the_callers_own_may_have_turns_and_is_held_to_them(demo_tokenizer):
    def converse(messages, tokenizer):
        return "".join(f"{role}: {words}\n" for role, words in messages) + "assistant:"

    own = PromptFormat(
        name="mine", render=lambda q, s: f"user: {q}\nassistant:", separator=" ", prepend_bos=False, converse=converse
    )
    assert own.encode(demo_tokenizer, TURNS[:3], "Yes.").text.endswith("assistant: Yes.")
    dropping = replace(own, converse=lambda messages, tokenizer: converse(messages[-1:], tokenizer))
    with pytest.raises(ValueError, match=r"'mine' drops or changes the words of the user 'Hi\. Who are you"):
        dropping.encode(demo_tokenizer, TURNS[:3])
    with pytest.raises(
        ValueError, match="got messages of user, assistant, user, but the format 'mine' holds one quest"
    ):
        replace(own, converse=None).encode(demo_tokenizer, TURNS[:3])


def test_a_format_whose_render_alone_was_replaced_does_not_fall_back_on_the_old_turns(demo_tokenizer, llama2_tokenizer):
    for fmt, tokenizer in (
        (chat_template_format(demo_tokenizer), demo_tokenizer),
        (LLAMA2_CHAT, llama2_tokenizer),
    ):
        half = replace(fmt, render=lambda question, system: f"{system or ''}Q: {question}\nA:")
        assert half.encode(tokenizer, "Why?").text == "Q: Why?\nA:"
        for talk in TALKS[:2]:
            with pytest.raises(ValueError, match="its converse is not that of its render; replace both, or"):
                half.encode(tokenizer, talk)
    clock = copy.deepcopy(demo_tokenizer)
    clock.chat_template = "{{ strftime_now('%S.%f') }} " + EVERY.replace("ROLE", "m.role").replace("WORDS", "m.content")
    assert chat_template_format(clock).encode(clock, TURNS).text.count("\n<") == 5


# ---- shown ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("talk", TALKS, ids=ids)
def test_whose_turn_each_token_is_of_is_known_and_shown(talk, demo_tokenizer, llama2_tokenizer):
    for fmt, tokenizer in (
        (chat_template_format(demo_tokenizer), demo_tokenizer),
        (LLAMA2_CHAT, llama2_tokenizer),
        (LLAMA2_CHAT_META, llama2_tokenizer),
    ):
        prompt = fmt.encode(tokenizer, talk, "Because.")
        assert [role for role, _, _ in prompt.turns] == [message["role"] for message in talk]
        stop_before = 0
        for (_, start, stop), message in zip(prompt.turns, talk, strict=True):
            assert stop_before <= start
            said = tokenizer.decode(prompt.tokens[start:stop])
            assert message["content"] in said
            assert len(said) <= len(message["content"]) + 3  # what else its first and last token cover
            stop_before = stop
        table = explain(prompt, tokenizer).splitlines()
        assert table[1].endswith("read steered turn")
        for role, start, _ in prompt.turns:
            assert table[2 + start].endswith(f" {role}")
        assert table[2 + prompt.steer_start].rstrip().endswith("steered")


def test_a_template_that_looks_at_the_words_is_shown_as_well(demo_tokenizer):
    tokenizer, fmt = templated(demo_tokenizer, words="('Please: ' if '?' in m.content else '') + m.content")
    prompt = fmt.encode(tokenizer, TURNS)
    for (_, start, stop), message in zip(prompt.turns, TURNS, strict=True):
        assert message["content"] in tokenizer.decode(prompt.tokens[start:stop])


def test_the_table_of_a_lone_question_is_what_it_was(demo_tokenizer):
    prompt = chat_template_format(demo_tokenizer).encode(demo_tokenizer, "Why?")
    assert prompt.turns == ()
    assert explain(prompt, demo_tokenizer).splitlines()[1].endswith("read steered")


# ---- text as it is ----------------------------------------------------------------------------------------------


def test_raw_is_the_text_with_the_tokens_that_the_tokenizer_makes_of_it(tiny_chat, llama2_tokenizer):
    from types import SimpleNamespace

    for tokenizer in (tiny_chat.tokenizer, llama2_tokenizer):
        raw = resolve_format(SimpleNamespace(tokenizer=tokenizer), "raw")
        for text in ("The capital of France is", " Two  blanks ", "Dear diary,\n", "def f(x):\n    return"):
            prompt = raw.encode(tokenizer, text)
            assert list(prompt.tokens) == tokenizer(text)["input_ids"]
            assert prompt.text == text
            assert prompt.format_name == "raw"
        prompt = raw.encode(tokenizer, "The capital of France is", " Paris.")
        assert list(prompt.tokens) == tokenizer("The capital of France is Paris.")["input_ids"]
        alone = raw.encode(tokenizer, "The capital of France is")
        assert prompt.steer_start == len(alone) - 1 == alone.steer_start
        assert prompt.answer_start == len(alone)
        assert prompt.read == (len(alone), len(prompt))


def test_steering_a_text_that_ends_with_a_blank_starts_at_its_last_character_that_is_none(tiny_chat):
    prompt = Prompt.of(tiny_chat, "The capital of France is ", prompt_format="raw")
    at = tiny_chat.tokenizer.decode(prompt.tokens[prompt.steer_start])
    assert at.strip() == "is"
    assert prompt.text.endswith("is ")


def test_raw_takes_neither_messages_nor_a_system_prompt(tiny_chat):
    for talk in (TURNS, TURNS[:1], [SYSTEM, *TURNS[:1]], as_question(TURNS)):
        with pytest.raises(ValueError, match="got messages for the format 'raw', which takes a text as it is: give a"):
            Prompt.of(tiny_chat, talk, prompt_format="raw")
    with pytest.raises(
        ValueError, match="the format 'raw' takes a text as it is, and has no place for a system prompt"
    ):
        Prompt.of(tiny_chat, "Once upon a time", system="Be kind.", prompt_format="raw")


def test_known_formats_are_listed_with_raw_among_them(tiny_chat):
    with pytest.raises(ValueError, match="llama2-chat, llama2-chat-meta, llama2-base, chat-template, raw, or a Prompt"):
        resolve_format(tiny_chat, "chatml")


# ---- forms a user may write -------------------------------------------------------------------------------------


def test_a_list_of_messages_is_one_prompt_and_a_list_of_such_lists_several(tiny_chat):
    assert listed(TURNS) == [TURNS]
    assert listed([TURNS, "Why?"]) == [TURNS, "Why?"]
    assert listed("Why?") == ["Why?"]
    assert (
        as_prompt(tiny_chat, TURNS)
        == Prompt.of(tiny_chat, TURNS)
        == default_format(tiny_chat).encode(tiny_chat.tokenizer, TURNS)
    )
    with pytest.raises(ValueError, match="got an empty list: expected a question, a list of messages"):
        listed([])
    with pytest.raises(TypeError, match="got messages and questions in one list"):
        listed([TURNS[0], "Why?"])
    with pytest.raises(TypeError, match="expected a question in words or in messages, or a Prompt"):
        as_prompt(tiny_chat, 3)
