"""What is extracted from a conversation, generated after it and read in it is what the model's own forward gives.

The slow twin has the tokens of `tokenizer.apply_chat_template`, plain hooks, and no cache, no padding, no batch.
"""

import pytest
import torch
from helpers.models import random_vectors
from helpers.twins import plain_forward, streams
from torch.testing import assert_close

import caa_lens as cl
from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.prompt_formats import Prompt

SYSTEM = {"role": "system", "content": "You are a pirate."}
TALK = [
    {"role": "user", "content": "Hi. Who are you?"},
    {"role": "assistant", "content": "A model. <- that is all."},
    {"role": "user", "content": "Say more, please."},
]
OTHER = [SYSTEM, *TALK, {"role": "assistant", "content": "Ahoy!"}, {"role": "user", "content": "And where are you?"}]
OPTIONS = "Is rain wet?\n (A) Yes\n (B) No"
TEXTS = ContrastSet.from_pairs(
    [(TALK, "I am happy.", "Go away, you."), (OTHER, "At sea, at last.", "Nowhere."), ("How was it?", "Fine.", "Bad.")],
    name="talks",
)
LETTERS = ContrastSet.from_pairs(
    [([*TALK, *OTHER[4:5], {"role": "user", "content": OPTIONS}], "(A)", "(B)"), (OPTIONS, "(B)", "(A)")],
    name="letters of talks",
)


def listed(question):
    return [{"role": "user", "content": question}] if isinstance(question, str) else question.to_list()


def rendered(model, question):
    """Tokens of the template's own text of a question."""
    text = model.tokenizer.apply_chat_template(listed(question), tokenize=False, add_generation_prompt=True)
    return text, model.tokenizer(text, add_special_tokens=False)["input_ids"]


def answered(model, question, answer):
    text, tokens = rendered(model, question)
    whole = model.tokenizer(text + answer, add_special_tokens=False)["input_ids"]
    assert whole[: len(tokens)] == tokens
    return whole, len(tokens)


@pytest.fixture
def v(tiny_chat):
    return random_vectors(tiny_chat, layers=[1], scale=0.3)[1]


def greedy(model, tokens, v, n):
    """Text by the model's own forward over everything, steered from the last token of the prompt on."""
    tokens, start = list(tokens), len(tokens) - 1
    for _ in range(n):
        tokens.append(int(plain_forward(model, tokens, [(1, v.direction, start)])[-1].argmax()))
    return tokens[start + 1 :]


@pytest.mark.parametrize("talk", [TALK, OTHER], ids=["three", "six"])
def test_generated_text_is_that_of_the_models_own_forward(talk, tiny_chat, v):
    expected = tiny_chat.tokenizer.decode(
        greedy(tiny_chat, rendered(tiny_chat, cl.contrast.Conversation.of(talk))[1], v, 6)
    )
    found = cl.generate(tiny_chat, talk, [v], max_new_tokens=6)
    assert found == expected
    assert "".join(cl.generate_stream(tiny_chat, talk, [v], max_new_tokens=6)) == expected
    assert found != cl.generate(tiny_chat, talk, max_new_tokens=6)
    assert found != cl.generate(tiny_chat, talk[-1]["content"], [v], max_new_tokens=6)


def test_a_batch_of_conversations_and_questions_is_each_alone(tiny_chat, v):
    several = [TALK, "How was it?", OTHER, cl.contrast.Conversation.of(TALK)]
    found = cl.generate(tiny_chat, several, [v], max_new_tokens=5)
    assert found == [cl.generate(tiny_chat, one, [v], max_new_tokens=5) for one in several]
    assert found[0] == found[3]
    assert cl.generate(tiny_chat, [TALK], [v], max_new_tokens=5) == found[:1]  # a list of one conversation: a list


def test_a_system_prompt_beside_a_conversation_is_its_first_message(tiny_chat, v):
    beside = cl.generate(tiny_chat, OTHER[1:], [v], max_new_tokens=5, system=SYSTEM["content"])
    assert beside == cl.generate(tiny_chat, OTHER, [v], max_new_tokens=5)
    with pytest.raises(ValueError, match="beside the message of the system 'You are a pirate"):
        cl.generate(tiny_chat, OTHER, [v], max_new_tokens=5, system="Be kind.")


def test_a_steered_block_starts_where_the_last_instruction_ends(tiny_chat, v):
    tokens = rendered(tiny_chat, cl.contrast.Conversation.of(OTHER))[1]
    with cl.steer(tiny_chat, v, prompt=OTHER):
        found = tiny_chat(torch.tensor([tokens]))[0]
    assert_close(found, plain_forward(tiny_chat, tokens, [(1, v.direction, len(tokens) - 1)]), rtol=1e-4, atol=1e-4)


def test_a_block_shows_the_turns_that_it_steers(tiny_chat, v, capsys):
    with cl.steer(tiny_chat, v, prompt=TALK, explain_positions=True):
        tiny_chat(torch.tensor([rendered(tiny_chat, cl.contrast.Conversation.of(TALK))[1]]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("read steered turn")
    assert [line.split()[-1] for line in lines if line.endswith(("user", "assistant"))].count("assistant") > 3
    assert sum("steered" in line for line in lines[2:]) == 2  # one token, and the line on generated ones


@pytest.mark.parametrize("pairs", [TEXTS, LETTERS], ids=["texts", "letters"])
def test_vectors_of_conversations_are_the_twins(pairs, tiny_chat):
    differences = []
    for pair in pairs:
        sides = []
        for answer in (pair.positive, pair.negative):
            tokens, start = answered(tiny_chat, pair.question, answer)
            read = slice(start + 1, start + 2) if pairs.kind == "ab" else slice(start, len(tokens))
            sides.append(streams(tiny_chat, tokens)[:, read].mean(1))
        differences.append(sides[0] - sides[1])
    expected = torch.stack(differences).mean(0)
    found = cl.extract(tiny_chat, pairs, progress=False)
    assert_close(found.directions.to(expected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs", [TEXTS, LETTERS], ids=["texts", "letters"])
def test_scores_of_conversations_are_the_twins(pairs, tiny_chat, v):
    expected = []
    for pair in pairs:
        logp = []
        for answer in (pair.positive, pair.negative):
            tokens, start = answered(tiny_chat, pair.question, answer)
            given = plain_forward(tiny_chat, tokens, [(1, v.direction, start - 1)]).log_softmax(-1)
            if pairs.kind == "ab":
                logp.append(given[start, tokens[start + 1]])
            else:
                logp.append(torch.stack([given[i - 1, tokens[i]] for i in range(start, len(tokens))]).mean())
        positive, negative = logp
        expected.append((positive - negative).sigmoid() if pairs.kind == "ab" else positive - negative)
    found = score_answers(tiny_chat, pairs, [(cl.Intervention(vector=v),)], progress=False)
    assert_close(found.values[:, 0].float(), torch.stack(expected).float().cpu(), rtol=1e-4, atol=1e-5)


def test_what_reads_a_prompt_reads_a_conversation_as_the_prompt_that_is_made_of_it(tiny_chat, v):
    prompt = Prompt.of(tiny_chat, OTHER)
    vectors = random_vectors(tiny_chat, layers=[1, 2])
    calls = {
        "similarity": lambda one: cl.token_similarity(tiny_chat, one, vectors),
        "residual lens": lambda one: cl.residual_lens(tiny_chat, one, vectors=[v]),
        "causal lens": lambda one: cl.logit_lens(
            tiny_chat, vectors, k=3, reading="causal", prompts=[one, "Why?"], controls=0, progress=False
        ),
        "attribution": lambda one: cl.interpretation.attribute_logits(tiny_chat, [(one, 5, 7)], v, progress=False),
    }
    for name, call in calls.items():
        of_talk, of_prompt = call(OTHER), call(prompt)
        assert of_talk.frame.equals(of_prompt.frame), name
    alone = cl.token_similarity(tiny_chat, OTHER, vectors, answer="Yes.")
    assert alone.answer_start == len(prompt)
    with pytest.raises(TypeError, match="got messages with raw_text=True"):
        cl.token_similarity(tiny_chat, OTHER, vectors, raw_text=True)


def test_side_effects_and_measures_of_texts_take_conversations(tiny_chat, v):
    found = cl.side_effects(
        tiny_chat,
        v,
        neutral=[TALK, "How are pencils made?"],
        capability={"talks": TEXTS[1:]},
        requests=[OTHER],
        n_tokens=3,
        n_random=1,
        n_resamples=10,
        progress=False,
    )
    shown = "user: Hi. Who are you?\n\nassistant: A model. <- that is all.\n\nuser: Say more, please."
    assert [one.question for one in found.answers][:2] == [shown, "How are pencils made?"]
    with pytest.raises(ValueError, match="neutral questions are questions of the pairs"):
        cl.side_effects(tiny_chat, v, neutral=[TALK], capability={"x": ContrastSet.from_pairs([(TALK, "a b", "c d")])})
    texts = cl.measures.measure_texts(tiny_chat, [(TALK, "Fine."), ("Why?", "So.")], progress=False)
    assert list(texts["question"]) == [shown, "Why?"]
    alone = Prompt.of(tiny_chat, TALK, "Fine.")
    logp = plain_forward(tiny_chat, list(alone.tokens)).log_softmax(-1)
    expected = [logp[i - 1, alone.tokens[i]] for i in range(alone.answer_start, len(alone))]
    assert texts["mean_logp"][0] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_a_text_as_it_is_is_steered_from_its_last_token_on(tiny_chat, v):
    tokens = tiny_chat.tokenizer("The capital of France is")["input_ids"]
    expected = tiny_chat.tokenizer.decode(greedy(tiny_chat, tokens, v, 5))
    assert cl.generate(tiny_chat, "The capital of France is", [v], max_new_tokens=5, prompt_format="raw") == expected
    pairs = ContrastSet.from_pairs([("The capital of France is", " Paris.", " a secret.")])
    found = cl.extract(tiny_chat, pairs, prompt_format="raw", progress=False)
    assert found.provenance.prompt_format == "raw"
    n = len(tokens)
    sides = [
        streams(tiny_chat, tiny_chat.tokenizer(f"The capital of France is{answer}")["input_ids"])[:, n:].mean(1)
        for answer in (" Paris.", " a secret.")
    ]
    assert_close(found.directions.to(sides[0]), sides[0] - sides[1], rtol=1e-4, atol=1e-5)
