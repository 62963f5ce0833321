"""Spans and masks of positions, against a plain hook without a cache; whatever the padding, the chunks or the cache."""

import pytest
import torch
from helpers.device import device
from helpers.models import random_vectors
from helpers.steering import LOGITS, Kept, logits_of, some_tokens, streams

from caa_lens.contrast.sets import ContrastSet
from caa_lens.engine.operators import OPERATORS
from caa_lens.engine.positions import Reach, check_positions, chosen
from caa_lens.interpretation.residual_stream import residual_lens
from caa_lens.measures.answers import score_answers
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate
from caa_lens.steering.interventions import Intervention
from caa_lens.steering.steered_block import steer

N_POS = 9
MASK = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 1, 0, 0]]).bool()
PLACES = {
    "span": ((3, 6), [range(3, 6)] * 2),
    "open span": ((4, None), [range(4, N_POS)] * 2),
    "span a row": ((torch.tensor([1, 5]), torch.tensor([2, 8])), [range(1, 2), range(5, 8)]),
    "beyond the end": ((7, 99), [range(7, N_POS)] * 2),
    "mask": (MASK, [row.nonzero()[:, 0].tolist() for row in MASK]),
    "short mask": (MASK[:, :5], [row.nonzero()[:, 0].tolist() for row in MASK[:, :5]]),
    "one row for all": (MASK[:1], [MASK[0].nonzero()[:, 0].tolist()] * 2),
}


def at(vector, where, operator="add", multiplier=1.0):
    """A plain hook that steers some positions of every row, in a forward over the whole text."""

    def edit(resid, hook):
        edited = resid.clone()
        for row, columns in enumerate(where):
            for pos in columns:
                edited[row, pos] = OPERATORS[operator](
                    resid[row, pos], {"direction": vector.direction.to(device())}, torch.tensor(multiplier)
                )
        return edited

    return vector.hook_name, edit


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("operator", ["add", "ablate", "set"])
def test_exactly_the_chosen_positions_are_steered_and_the_others_untouched_bit_for_bit(tiny, place, operator):
    positions, where = PLACES[place]
    v, tokens, resid = random_vectors(tiny)[2], some_tokens(2, N_POS), {}
    keep = (v.hook_name, lambda stream, hook: resid.update(after=stream))
    steered = logits_of(tiny, tokens, [v.hook(multiplier=1.5, operator=operator, positions=positions), keep])
    with steer(tiny, Intervention(vector=v, multiplier=1.5, operator=operator), positions=positions):
        assert torch.equal(logits_of(tiny, tokens), steered)
    torch.testing.assert_close(steered, logits_of(tiny, tokens, [at(v, where, operator, 1.5)]), **LOGITS)
    changed = (resid["after"] != streams(tiny, tokens)[v.layer]).any(-1)
    assert [row.nonzero()[:, 0].tolist() for row in changed] == [list(columns) for columns in where]


@pytest.mark.parametrize("sizes", [[1] * N_POS, [4, 2, 3], [5, 1, 1, 1, 1]], ids=["tokens", "chunks", "prompt, tokens"])
@pytest.mark.parametrize("padding", [(0, 0), (0, 4)], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("place", PLACES)
def test_positions_mean_the_same_in_chunks_with_a_kv_cache(tiny, place, padding, sizes):
    positions, where = PLACES[place]
    tokens, v = some_tokens(2, N_POS), random_vectors(tiny)[1]
    mask = (torch.arange(N_POS) >= torch.tensor(padding)[:, None]).long()
    expected = logits_of(tiny, tokens, [at(v, where)], attention_mask=mask)
    kept, pieces = Kept(tiny, 2), []
    with steer(tiny, v, positions=positions):
        for piece, real in zip(tokens.split(sizes, 1), mask.split(sizes, 1), strict=True):
            pieces.append(kept(piece, mask=real))
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()], **LOGITS)


def test_a_span_counts_from_each_prompts_own_first_token_and_last_is_its_last(tiny_chat):
    v = random_vectors(tiny_chat)[2]
    prompts = [Prompt.of(tiny_chat, text) for text in ("Why?", "Is it right to lie to a friend?")]
    batch = left_pad(prompts, n_ctx=tiny_chat.cfg.n_ctx, device=device())
    for positions in ("last", (2, 5), (3, None), (torch.tensor([2, 4]), torch.tensor([3, 7]))):
        with steer(tiny_chat, v, prompt=prompts, positions=positions):
            together = logits_of(tiny_chat, batch.tokens, attention_mask=batch.attention_mask)
        for row, prompt in enumerate(prompts):
            span = (len(prompt) - 1, len(prompt)) if positions == "last" else positions
            first, stop = (end if isinstance(end, int | None) else int(end[row]) for end in span)
            tokens = torch.tensor([prompt.tokens])
            expected = logits_of(tiny_chat, tokens, [at(v, [range(first, stop or len(prompt))])])
            torch.testing.assert_close(together[row, batch.padding[row] :], expected[0], **LOGITS)
            if isinstance(span[0], int):
                with steer(tiny_chat, v, prompt=prompt, positions=positions):
                    torch.testing.assert_close(logits_of(tiny_chat, tokens), expected, **LOGITS)


def test_generation_steers_the_chosen_positions_only(tiny_chat):
    """The last token alone, all generated tokens, and a mask: with a cache, without, and in plain hooks."""
    v = random_vectors(tiny_chat, scale=3.0)[2]
    prompt = Prompt.of(tiny_chat, "How was your day?")
    n, steps = len(prompt), 5
    mask = torch.zeros(1, n + 2, dtype=torch.bool)
    mask[0, [1, n - 1, n + 1]] = True
    for positions, where in (
        ((n - 1, n), [n - 1]),
        ((n, None), range(n, n + steps)),
        (mask, [1, n - 1, n + 1]),
        ((n, n + 2), [n, n + 1]),
    ):
        tokens = list(prompt.tokens)
        for _ in range(steps):
            here = [[pos for pos in where if pos < len(tokens)]]
            tokens.append(int(logits_of(tiny_chat, torch.tensor([tokens]), [at(v, here)])[0, -1].argmax()))
        expected = tiny_chat.tokenizer.decode(tokens[n:])
        for use_cache in (True, False):
            steering = [Intervention(vector=v, positions=positions)]
            assert generate(tiny_chat, prompt, steering, max_new_tokens=steps, use_cache=use_cache) == expected
        with steer(tiny_chat, v, prompt=prompt, positions=positions):
            settings = {"max_new_tokens": steps, "do_sample": False, "stop_at_eos": False, "verbose": False}
            theirs = tiny_chat.generate(torch.tensor([prompt.tokens]), **settings)
        assert theirs[0].tolist() == tokens


def test_zero_and_a_mask_of_nothing_leave_every_number_as_it_is(tiny):
    v, tokens = random_vectors(tiny)[2], some_tokens(2, N_POS)
    plain = logits_of(tiny, tokens)
    for steering in ({"multiplier": 0.0, "positions": (2, 4)}, {"positions": torch.zeros(2, 9, dtype=torch.bool)}):
        with steer(tiny, v, **steering):  # warnings are errors here
            assert torch.equal(logits_of(tiny, tokens), plain)


def test_the_lens_of_the_stream_honours_positions_and_scores_refuse_them(tiny_chat):
    v = random_vectors(tiny_chat, scale=3.0)[2]
    prompt = Prompt.of(tiny_chat, "How was your day?")
    lens = residual_lens(tiny_chat, prompt, vectors=[Intervention(vector=v, positions=(2, 3))], layers=[4])
    said = logits_of(tiny_chat, torch.tensor([prompt.tokens]), [at(v, [[2]])])[0, -1].softmax(-1).max()
    assert lens.steer_start == 2
    assert lens.frame[lens.frame.steered]["probability"].iloc[-1] == pytest.approx(float(said), abs=1e-5)
    pairs = ContrastSet.from_pairs([("Is it?", "Yes.", "No.")])
    with pytest.raises(ValueError, match="takes no start and no positions: score the model's logits inside"):
        score_answers(tiny_chat, pairs, [(Intervention(vector=v, positions=(2, 3)),)], progress=False)


def test_what_is_steered_is_told(tiny_chat, capsys):
    v, prompt = random_vectors(tiny_chat)[2], Prompt.of(tiny_chat, "Why?")
    n = len(prompt)
    for positions, steered, after in (
        ("last", [n - 1], "no generated token is steered"),
        ((2, 4), [2, 3], "no generated token is steered"),
        ((n, None), [], "every generated token is steered"),
        ((n - 1, n + 2), [n - 1], f"of the generated tokens, those before position {n + 2} of the batch are steered"),
    ):
        with steer(tiny_chat, v, prompt=prompt, positions=positions, explain_positions=True):
            pass
        *rows, last = capsys.readouterr().out.strip().splitlines()[2:]
        assert [pos for pos, row in enumerate(rows) if row.endswith("steered")] == steered
        assert last == f"and {after}"
    with steer(tiny_chat, v, positions=(3, 4), explain_positions=True) as _:
        assert capsys.readouterr().out == "steered at position 3\n"


def test_a_reach_says_which_positions_any_row_has():
    generator = torch.Generator().manual_seed(1)
    for positions, _ in PLACES.values():
        reach = Reach.of(positions)
        whole = chosen(positions, behind=0, n_rows=2, n_pos=20, device=torch.device("cpu"))
        for _ in range(30):
            behind, n_pos = torch.randint(1, 10, (2,), generator=generator).tolist()
            part = chosen(positions, behind=behind, n_rows=2, n_pos=n_pos, device=torch.device("cpu"))
            assert torch.equal(part, whole[:, behind : behind + n_pos])
            if not isinstance(positions, tuple) or isinstance(positions[0], int):
                assert reach.meets(behind, behind + n_pos) == bool(part.any())
    assert [str(Reach.of(where)) for where in ((3, 7), (3, None), (3, 4), MASK, ~MASK & MASK)] == [
        "at positions 3 to 6",
        "from position 3 on",
        "at position 3",
        "at 6 positions from 0 to 8",
        "at no position",
    ]


@pytest.mark.parametrize(
    ("positions", "error", "text"),
    [
        ((5, 5), ValueError, r"the span \(5, 5\) has no positions: expected the second behind the first"),
        ((-1, 5), ValueError, "positions are counted from 0, got -1"),
        ((torch.tensor([1.0]), None), ValueError, r"a whole number or \[batch\], got torch.float32"),
        (torch.ones(1, 5), ValueError, r"must be bool \[batch pos\], got float32 of shape \(1, 5\): a span is written"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"must be bool \[batch pos\], got bool of shape \(5,\)"),
        ("last", TypeError, "is known to steer.*positions='last'"),
        (4, TypeError, r"one position is \(4, 5\), and start=4 steers from it on"),
        ([3, 5], TypeError, r"must be a span \(first, stop\) or a bool mask \[batch pos\], got \[3, 5\]"),
        ((1.5, 3), TypeError, "two whole numbers or tensors"),
        ((1, 2, 3), TypeError, "must be a span"),
    ],
)
def test_what_is_no_span_and_no_mask_is_refused(positions, error, text):
    with pytest.raises(error, match=text):
        check_positions(positions)


def test_positions_that_do_not_fit_together_are_refused(tiny, tiny_chat):
    v = random_vectors(tiny)[2]
    with pytest.raises(ValueError, match=r"give either start or positions: positions=\(first, None\) is start=first"):
        Intervention(vector=v, start=3, positions=(3, 5))
    with pytest.raises(ValueError, match="the mask of positions has 3 rows for a batch of 2: give one row, or as many"):
        logits_of(tiny, some_tokens(2, N_POS), [v.hook(positions=torch.ones(3, 4, dtype=torch.bool))])
    with pytest.raises(ValueError, match=r"either positions=..., or start=..., not both"):
        steer(tiny, v, start=3, positions=(3, 5))
    with pytest.raises(TypeError, match="positions='last'"):
        steer(tiny, v, positions="last")
    with pytest.raises(TypeError, match="must be a span"):
        steer(tiny_chat, random_vectors(tiny_chat)[2], prompt="Why?", positions="first")


def test_a_span_may_begin_at_the_first_token():
    assert check_positions((0, 2)) == (0, 2)
    with pytest.raises(ValueError, match="positions are counted from 0, got -1"):
        check_positions((-1, 2))
