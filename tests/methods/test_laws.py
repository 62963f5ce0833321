"""Laws of every operator and method, on both kinds of model: strength 0, a KV cache, and padding change nothing."""

import pytest
import torch
from helpers.device import device
from helpers.methods import PAIRS
from helpers.steered_cases import MAKERS, PROMPTS, made
from helpers.steering import Kept, logits_of
from torch.testing import assert_close

from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt, default_format, encode_answer
from caa_lens.steering.generation import generate_tokens
from caa_lens.steering.steered_block import steer

pytestmark = pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning")
NEAR = {"atol": 1e-4, "rtol": 1e-4}  # another order of float32 additions, after steps of several times the stream
every_case = pytest.mark.parametrize("case", MAKERS)


@pytest.fixture(scope="module")
def prompts(tiny_chat):
    found = [Prompt.of(tiny_chat, question) for question in PROMPTS]
    assert len({len(one) for one in found}) == 3
    return found


def steered(model, orders, prompt):
    with steer(model, *orders, prompt=prompt):
        return logits_of(model, [prompt.tokens])[0]


@every_case
def test_strength_0_is_the_unsteered_model_bit_for_bit(tiny_chat, prompts, case):
    nothing = made(tiny_chat, case)(0.0)
    if nothing[0].operator == "set":  # whose strength is where it sets to
        return
    batch = left_pad(prompts, n_ctx=512, device=device())
    plain = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
    with steer(tiny_chat, *nothing, prompt=prompts):
        assert torch.equal(logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask), plain)
    scores = score_answers(tiny_chat, PAIRS, [(), nothing], progress=False).values
    assert torch.equal(scores[:, 0], scores[:, 1])


@every_case
def test_one_token_at_a_time_is_one_forward_and_a_padded_batch_is_each_row_alone(tiny_chat, prompts, case):
    orders = made(tiny_chat, case)(1.0)
    alone = [steered(tiny_chat, orders, prompt) for prompt in prompts]
    plain = [logits_of(tiny_chat, [prompt.tokens])[0] for prompt in prompts]
    changed = [float((one - other).abs().max()) for one, other in zip(alone, plain, strict=True)]
    assert max(changed) > 1e-3
    batch = left_pad(prompts, n_ctx=512, device=device())
    with steer(tiny_chat, *orders, prompt=prompts):
        together = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
        text = Kept(tiny_chat, n_rows=3)
        columns = range(batch.tokens.shape[1])
        mask = batch.attention_mask
        pieces = [text(batch.tokens[:, i : i + 1], mask=mask[:, i : i + 1])[:, 0] for i in columns]
    one_by_one = torch.stack(pieces, dim=1)
    for row, expected in enumerate(alone):
        assert_close(together[row, batch.padding[row] :], expected, **NEAR)
        assert_close(one_by_one[row, batch.padding[row] :], expected, **NEAR)


@every_case
def test_scores_are_those_of_whole_texts_in_a_steered_block(tiny_chat, case):
    """Shared prompts, rows from the first token on, or one run a condition: whichever it takes."""
    one, half = made(tiny_chat, case)(1.0), made(tiny_chat, case)(0.5)
    found = score_answers(tiny_chat, PAIRS, [one, (), half, one], progress=False).values
    assert torch.equal(found[:, 0], found[:, 3])
    fmt = default_format(tiny_chat)
    for row, pair in enumerate(PAIRS):
        for column, orders in ((0, one), (1, ()), (2, half)):
            means = []
            for answer in (pair.positive, pair.negative):
                prompt = encode_answer(fmt, tiny_chat.tokenizer, pair.question, answer)
                logp = steered(tiny_chat, orders, prompt)[prompt.answer_start - 1 : -1].log_softmax(-1)
                targets = torch.tensor(prompt.tokens[prompt.answer_start :])
                means.append(logp.gather(-1, targets[:, None]).mean())
            assert_close(found[row, column], means[0] - means[1], atol=1e-4, rtol=1e-4)
    assert float((found[:, 0] - found[:, 1]).abs().max()) > 1e-4


@every_case
def test_the_lens_of_the_stream_ends_in_what_a_steered_block_says(tiny_chat, prompts, case):
    orders, prompt = list(made(tiny_chat, case)(1.0)), prompts[1]
    frame = residual_lens(tiny_chat, prompt, vectors=orders, layers=[0, 4], positions=range(len(prompt))).frame
    p, ids = steered(tiny_chat, orders, prompt).softmax(-1).max(-1)
    last = frame[frame["steered"] & (frame["layer"] == 4)].sort_values("position")
    assert last["top_token_id"].tolist() == ids.tolist()
    assert last["probability"].tolist() == pytest.approx(p.tolist(), abs=1e-4)


@every_case
def test_generated_batches_are_each_prompt_alone_with_and_without_a_cache(tiny_chat, prompts, case):
    orders = list(made(tiny_chat, case)(1.0))
    expected = []
    for prompt in prompts:
        tokens = list(prompt.tokens)
        for _ in range(3):  # the whole text again for each token, with the prompt's own positions
            with steer(tiny_chat, *orders, prompt=prompt):
                tokens.append(int(logits_of(tiny_chat, [tokens])[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])
    for use_cache in (True, False):
        steps = generate_tokens(tiny_chat, prompts, vectors=orders, max_new_tokens=3, use_cache=use_cache)
        assert torch.stack(list(steps), dim=1).tolist() == expected
