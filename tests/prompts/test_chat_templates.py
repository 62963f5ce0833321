"""A chat template that loses or changes what it is given is refused by name, and Llama 2's own is recognised."""

import copy

import pytest
from helpers.templates import LLAMA2_TEMPLATE

from caa_lens.prompts.chat_templates import is_llama2_template
from caa_lens.prompts.prompt_formats import LLAMA2_CHAT_META, PromptFormat, chat_template_format

EVERY = "{% for m in messages %}<{{ m.role }}>CONTENT\n{% endfor %}<assistant>"
USER = "{% for m in messages if m.role == 'user' %}<user>CONTENT\n{% endfor %}<assistant>"
QUESTIONS = [
    "Why?",
    "user",
    "<",
    "a b",
    "What is the capital of France, and of Chad?",
    "日本 é\n\n(A) Yes\n (B) No",
    "m" * 900,
]
SYSTEM = "Be kind."


@pytest.fixture
def with_template(demo_tokenizer):
    """The demo's tokenizer with another template."""

    def make(template):
        tokenizer = copy.deepcopy(demo_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return make


def encoded(tokenizer, question, **options):
    return chat_template_format(tokenizer).encode(tokenizer, question, **options)


@pytest.mark.parametrize("content", ["m.content", "m['content']"])
def test_a_template_that_keeps_both_is_taken_whatever_is_asked(content, with_template):
    tokenizer = with_template(EVERY.replace("CONTENT", "{{ " + content + " }}"))
    for question in [*QUESTIONS, "  blanks  ", "\n" + "line"]:
        for system in [None, SYSTEM, "user", question]:
            text = encoded(tokenizer, question, system=system).text
            told = f"<system>{system}\n" if system else ""
            assert text == f"{told}<user>{question}\n<assistant>"


def test_the_real_template_takes_its_own_default_system_prompt(demo_tokenizer):
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert encoded(demo_tokenizer, "Why?", system=default) == encoded(demo_tokenizer, "Why?")


def test_a_template_may_tell_the_date_and_look_at_the_question(with_template):
    clock = with_template("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }} " + USER.replace("CONTENT", "{{ m.content }}"))
    polite = with_template(USER.replace("CONTENT", "{% if '?' in m.content %}Please: {% endif %}{{ m.content }}"))
    twice = with_template(USER.replace("CONTENT", "{{ m.content }} Again: {{ m.content }}"))
    for question in QUESTIONS:
        assert f"<user>{question}\n" in encoded(clock, question).text
        assert f"{question}\n<assistant>" in encoded(polite, question).text
        assert f"<user>{question} Again: {question}\n" in encoded(twice, question).text


@pytest.mark.parametrize("system", [SYSTEM, "user", "Why?", "<", "<assistant>"])
def test_a_template_that_ignores_the_system_prompt_is_refused(system, with_template):
    tokenizer = with_template(USER.replace("CONTENT", "{{ m.content }}"))
    assert encoded(tokenizer, "Why?").text == "<user>Why?\n<assistant>"
    with pytest.raises(ValueError, match=r"chat template drops or changes the system prompt '.+': put it into"):
        encoded(tokenizer, "Why?", system=system)


def test_a_template_that_raises_on_a_system_prompt_is_refused(with_template):
    raises = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = with_template(raises + USER.replace("CONTENT", "{{ m.content }}"))
    assert encoded(tokenizer, "Why?").text == "<user>Why?\n<assistant>"
    with pytest.raises(
        ValueError, match=r"takes no system prompt \(TemplateError: System role not supported\): put it"
    ):
        encoded(tokenizer, "Why?", system=SYSTEM)


@pytest.mark.parametrize(
    "content",
    [
        "{{ m.content[:20] }}",
        "{{ m.content | upper }}",
        "{{ m.content | lower }}",
        "{{ m.content | capitalize }}",
        "{{ m.content | tojson }}",
        "{{ m.content | escape }}",
        "{{ m.content | replace('  ', ' ') }}",
        "{{ m.content | truncate(30) }}",
        "{{ m.content.split('\n')[0] }}",
        "{{ m.content | wordwrap(20) }}",
        "",
        "Why is that so? It says user, a b, < and > in any case.",
    ],
)
def test_a_template_that_drops_or_changes_the_question_is_refused_for_every_such_question(content, with_template):
    template = USER.replace("CONTENT", content)
    tokenizer = with_template(template)
    asked = [*QUESTIONS, "a  b", "tell <b> & 'c'", "What IS the capital of the country that lies\nbehind the hills?"]
    refused = 0
    for question in asked:
        own = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        if content and own in (f"<user>{question}\n<assistant>", f'<user>"{question}"\n<assistant>'):
            assert encoded(tokenizer, question).text == own
            continue
        refused += 1
        with pytest.raises(
            ValueError, match=r"chat template drops or changes the question .*choose another format with"
        ):
            encoded(tokenizer, question)
    assert refused


def test_a_template_that_strips_says_so(with_template):
    tokenizer = with_template(EVERY.replace("CONTENT", "{{ m.content | trim }}"))
    assert "<system>Be kind.\n<user>Why?\n" in encoded(tokenizer, "Why?", system=SYSTEM).text
    with pytest.raises(ValueError, match=r"template strips the blanks .* around the question ' Why\?': ask what"):
        encoded(tokenizer, " Why?")
    with pytest.raises(
        ValueError, match=r"template strips the blanks .* around the system prompt 'Be kind\.\\n': put it"
    ):
        encoded(tokenizer, "Why?", system=SYSTEM + "\n")
    with pytest.raises(ValueError, match=r"template strips the blanks .* around the question 'Why\?\\n': ask what"):
        encoded(tokenizer, "Why?\n")  # the template writes a line break of its own there


@pytest.mark.parametrize(
    "template", ["{% for m in %}", "{{ messages[7].content }}{{ nothing.at.all }}", "{{ 1 + 'a' }}"]
)
def test_a_broken_template_is_said_to_be_broken(template, with_template):
    for system in (None, SYSTEM):
        with pytest.raises(ValueError, match=r"the model's chat template failed on a single question \(\w+: .*choose"):
            encoded(with_template(template), "Why?", system=system)


def test_formats_of_the_callers_own_are_held_to_the_same(demo_tokenizer):
    plain = {"separator": " ", "prepend_bos": False}
    deaf = PromptFormat(name="deaf", render=lambda question, system: f"Q: {question}\nA:", **plain)
    assert deaf.encode(demo_tokenizer, "Why?").text == "Q: Why?\nA:"
    with pytest.raises(ValueError, match=r"format 'deaf' drops or changes the system prompt 'Be kind.'.*leave it out"):
        deaf.encode(demo_tokenizer, "Why?", system=SYSTEM)
    loud = PromptFormat(name="loud", render=lambda question, system: question.upper(), **plain)
    with pytest.raises(ValueError, match=r"format 'loud' drops or changes the question 'Why\?'"):
        loud.encode(demo_tokenizer, "Why?")


def test_llama_2s_own_template_is_recognised_by_what_it_writes(with_template, demo_tokenizer):
    assert is_llama2_template(with_template(LLAMA2_TEMPLATE))
    before = "{% for m in messages %}{% if m.role == 'system' %}<<SYS>>\n{{ m.content }}\n<</SYS>>\n\n{% else %}[INST] "
    assert is_llama2_template(with_template(before + "{{ m.content }} [/INST]{% endif %}{% endfor %}"))
    talkative = LLAMA2_TEMPLATE.replace("set system_message = false", "set system_message = 'You are helpful.'")
    for other in [
        talkative,
        LLAMA2_TEMPLATE.replace("<</SYS>>", "<<END>>"),
        LLAMA2_TEMPLATE.replace("<<SYS>>", "<<sys>>"),
        LLAMA2_TEMPLATE + "{# [INST] #}!",
        "{{ '<<SYS>>[INST]' + 1 }}",
    ]:
        assert not is_llama2_template(with_template(other))
    assert not is_llama2_template(demo_tokenizer)


def test_metas_template_and_metas_format_are_the_same_text(with_template):
    tokenizer = with_template(LLAMA2_TEMPLATE)
    for question in ["Why?", "日本\n\n(A) Yes"]:
        for system in (None, SYSTEM):
            text = encoded(tokenizer, question, system=system).text
            assert text == tokenizer.bos_token + LLAMA2_CHAT_META.render(question, system)
