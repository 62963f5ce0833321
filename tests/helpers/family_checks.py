"""Every function that runs a model against its twin, as small checks of one model.

A check takes a `Case` and raises `AssertionError` where a number is not the twin's. What the package refuses it refuses
with a `ValueError`, `TypeError` or `RuntimeError`, which is an outcome of its own, see `outcome`.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import caa_lens as cl
from caa_lens.engine.shared_prefix import SharedPrefixWarning
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens
from helpers.families import ATTENTION_WRITES, SEES_PADDING, bridge_of, demo_tokenizer, hf_of
from helpers.family_twins import Step, Twin
from helpers.models import random_vectors

RELATIVE = 1e-5  # of the largest number, where float32 sums come in another order
SCORES = 2e-5  # log-probabilities, in nats
AB = cl.ContrastSet.load("refusal")[:3]
TEXTS = cl.ContrastSet.load("sentiment")[:2]
LONG, SHORT = "How was your day? Tell me all about it, please, in many words.", "Why?"
N_NEW = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of the package's, and the twin that says what its numbers are."""

    name: str
    model: Any
    twin: Twin

    @property
    def vectors(self) -> Any:
        return random_vectors(self.model, scale=2.0)

    def step(self, layer: int, multiplier: float = 1.0, operator: str = "add", start: int = 0) -> Step:
        """The twin's word for what is done with the layer's vector."""
        return Step(layer, self.vectors[layer].direction, start, multiplier, operator)


def case_of(name: str) -> Case:
    """A family's bridge and its twin."""
    return Case(name=name, model=bridge_of(name), twin=Twin(hf_of(name), demo_tokenizer()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a check: refused, or the twin's numbers, perhaps by way of the model's own whole forward."""

    refused: str = ""
    slow: str = ""


def outcome(case: Case, check: Callable[[Case], None]) -> Outcome:
    """Runs a check. Raises what it raises, unless that is a refusal, and for warnings but that of the slow path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check(case)
        except (ValueError, TypeError, RuntimeError) as error:
            if type(error) not in (ValueError, TypeError, RuntimeError) or not is_ours(error):
                raise
            return Outcome(refused=_in_one_line(error))
    slow = [one for one in caught if issubclass(one.category, SharedPrefixWarning)]
    ours = [one for one in caught if one.category.__module__.startswith("caa_lens") and one not in slow]
    assert not ours, f"{ours[0].category.__name__}: {ours[0].message}"
    return Outcome(slow=_in_one_line(slow[0].message) if slow else "")


def is_ours(error: BaseException) -> bool:
    """Whether it was raised in the package itself, in a sentence of its own."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and "/caa_lens/" in place.tb_frame.f_code.co_filename.replace("\\", "/")


def _in_one_line(words: object) -> str:
    return re.sub(r"\s+", " ", str(words))


def assert_near(found: Any, expected: Any, *, relative: float = RELATIVE, least: float = 0.0) -> None:
    """Every number within `relative` of the largest expected one, and a plain `least` where that is more."""
    found, expected = (torch.tensor(one) if not isinstance(one, Tensor) else one for one in (found, expected))
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    assert bool(found.isfinite().all())
    error = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    assert error <= max(relative * largest, least), f"off by {error:.2g}, the largest number being {largest:.3g}"


# ---- reading ---------------------------------------------------------------------------------------------------------


def extract(case: Case) -> None:
    for pairs in (AB, TEXTS):
        found = cl.extract(case.model, pairs, progress=False).directions
        for layer, expected in enumerate(case.twin.vectors(pairs)):
            assert_near(found[layer], expected)


def pair_activations(case: Case) -> None:
    found = cl.engine.pair_activations(case.model, TEXTS, progress=False)
    for row, norms, pair in zip(found.values, found.norms, TEXTS, strict=True):
        assert_near(row, case.twin.activations(pair))
        assert_near(norms, case.twin.norms(pair))


def token_similarity(case: Case) -> None:
    found = cl.token_similarity(case.model, LONG, case.vectors, answer="I love it.")
    text = case.twin.text(LONG, "I love it.")
    assert list(found.frame.drop_duplicates("position")["token_id"]) == text.tokens
    streams, directions = case.twin.run(text.tokens).streams, case.vectors.directions
    dots = torch.einsum("lpd,ld->pl", streams, directions)
    assert_near(found.summary("dot").to_numpy(), dots)
    cosines = dots / streams.norm(dim=-1).T / directions.norm(dim=-1)
    assert_near(found.summary("cosine").to_numpy(), cosines)


# ---- steering --------------------------------------------------------------------------------------------------------


def steer(case: Case) -> None:
    """Every operator at every layer, two at once, and two prompts of unequal length in one batch."""
    text = case.twin.text(LONG)
    n_layers = case.twin.n_layers
    given = [[(layer, 1.5, "add")] for layer in range(n_layers)]
    given += [[(1, 1.0, "ablate")], [(2, -0.7, "set")], [(0, 1.0, "add"), (n_layers - 1, -2.0, "add")]]
    for acts in given:
        steps = [case.step(*act, start=text.start) for act in acts]
        interventions = [
            cl.Intervention(vector=case.vectors[layer], multiplier=m, operator=operator) for layer, m, operator in acts
        ]
        with cl.steer(case.model, *interventions, prompt=LONG), torch.no_grad():
            found = case.model(torch.tensor([text.tokens]))[0]
        assert_near(found, case.twin.run(text.tokens, steps).logits)
    with torch.no_grad():
        assert_near(case.model(torch.tensor([text.tokens]))[0], case.twin.run(text.tokens).logits)


def steer_batch(case: Case) -> None:
    """Two prompts of unequal length, padded on the left."""
    prompts = [Prompt.of(case.model, question) for question in (SHORT, LONG)]
    batch = cl.prompts.left_pad(prompts, n_ctx=case.model.cfg.n_ctx)
    with cl.steer(case.model, case.vectors[1], prompt=prompts), torch.no_grad():
        found = case.model(batch.tokens, attention_mask=batch.attention_mask)
    for row, question, n_padding in zip(found, (SHORT, LONG), batch.padding.tolist(), strict=True):
        if n_padding and case.name in SEES_PADDING:
            continue
        text = case.twin.text(question)
        assert_near(row[n_padding:], case.twin.run(text.tokens, [case.step(1, start=text.start)]).logits)


def steer_generate(case: Case) -> None:
    """The model's own loop, with its own cache, inside a block."""
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(1, start=text.start)], N_NEW)
    with cl.steer(case.model, case.vectors[1], prompt=LONG):
        assert own_loop(case.model, text.tokens) == expected


def hook(case: Case) -> None:
    """An intervention's hook in TransformerLens' own ways to run a model; `hook_generate` is of its cache."""
    text = case.twin.text(LONG)
    last = case.twin.n_layers - 1
    for layer, operator in ((1, "add"), (2, "ablate"), (last, "set")):
        intervention = cl.Intervention(vector=case.vectors[layer], multiplier=1.5, operator=operator, start=text.start)
        tokens = torch.tensor([text.tokens])
        with torch.no_grad():
            found = case.model.run_with_hooks(tokens, fwd_hooks=[intervention.hook()])[0]
        expected = case.twin.run(text.tokens, [case.step(layer, 1.5, operator, text.start)])
        assert_near(found, expected.logits)
        with case.model.hooks(fwd_hooks=[intervention.hook()]), torch.no_grad():
            _, kept = case.model.run_with_cache(tokens)
        assert_near(kept[f"blocks.{layer}.hook_resid_post"][0], expected.streams[layer])


def hook_generate(case: Case) -> None:
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(2, start=text.start)], N_NEW)
    intervention = cl.Intervention(vector=case.vectors[2], start=text.start)
    with case.model.hooks(fwd_hooks=[intervention.hook()]):
        assert own_loop(case.model, text.tokens) == expected


def own_loop(model: Any, tokens: list[int], n_new: int = N_NEW) -> list[int]:
    """The new tokens of the model's own greedy loop, with its own cache."""
    settings = {"do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": True}
    with torch.no_grad():
        new = model.generate(torch.tensor([tokens]), max_new_tokens=n_new, **settings)[0, len(tokens) :].tolist()
    eos = model.tokenizer.eos_token_id
    end = new.index(eos) + 1 if eos in new else n_new
    return [*new[:end], *[eos] * (n_new - end)]


def rows_of(steps: Any, n_new: int) -> list[list[int]]:
    """All rows' new tokens; where every row has come to its end, that again and again."""
    rows = torch.stack(list(steps), dim=1).tolist()
    return [[*row, *[row[-1]] * (n_new - len(row))] for row in rows]


def generate(case: Case, *, use_cache: bool = True) -> None:
    """One prompt, two of unequal length, two multipliers of one, and no vector at all."""
    questions = (SHORT, LONG)
    texts = [case.twin.text(question) for question in questions]
    steered = [case.twin.greedy(text.tokens, [case.step(1, 1.5, start=text.start)], N_NEW) for text in texts]
    plain = case.twin.greedy(texts[1].tokens, [], N_NEW)
    prompts = [Prompt.of(case.model, question) for question in questions]
    assert [list(prompt.tokens) for prompt in prompts] == [text.tokens for text in texts]
    several = torch.tensor([0.0, 1.5])
    asked: list[tuple[list[Prompt], Any, list[list[int]]]] = [
        ([prompts[1]], [(case.vectors[1], 1.5)], [steered[1]]),
        (prompts, [(case.vectors[1], 1.5)], steered),
        ([prompts[1]] * 2, [(case.vectors[1], several)], [plain, steered[1]]),
        ([prompts[1]], [], [plain]),
    ]
    for given, vectors, expected in asked:
        steps = generate_tokens(case.model, given, vectors=vectors, max_new_tokens=N_NEW, use_cache=use_cache)
        assert rows_of(steps, N_NEW) == expected
    said = cl.generate(case.model, LONG, [(case.vectors[1], 1.5)], max_new_tokens=N_NEW, use_cache=use_cache)
    assert said == case.twin.words(steered[1])


def generate_uncached(case: Case) -> None:
    generate(case, use_cache=False)


def generate_stream(case: Case) -> None:
    text = case.twin.text(LONG)
    expected = case.twin.greedy(text.tokens, [case.step(2, start=text.start)], N_NEW)
    pieces = cl.generate_stream(case.model, LONG, [case.vectors[2]], max_new_tokens=N_NEW)
    assert "".join(pieces) == case.twin.words(expected)


# ---- measures --------------------------------------------------------------------------------------------------------


def score_answers(case: Case) -> None:
    """Under no vector, under one at each end of the model, under an ablated one, and under two at once."""
    last = case.twin.n_layers - 1
    given = [[], [(0, 1.0)], [(last, -1.5)], [(1, 1.0, "ablate")], [(0, 0.5), (2, 1.0)]]
    conditions = [
        tuple(
            cl.Intervention(vector=case.vectors[act[0]], multiplier=act[1], operator=(*act, "add")[2]) for act in acts
        )
        for acts in given
    ]
    for pairs in (AB, TEXTS):
        found = cl.measures.score_answers(case.model, pairs, conditions, progress=False)
        for row, pair in enumerate(pairs):
            for column, acts in enumerate(given):
                expected = case.twin.sides(pair, [case.step(*act) for act in acts])
                sides = torch.stack([found.positive[row, column], found.negative[row, column]])
                assert_near(sides, expected, least=SCORES)
                value = expected[0].exp() if pairs.kind == "ab" else expected[0] - expected[1]
                assert_near(found.values[row, column], value, least=SCORES)


def sweep(case: Case) -> None:
    for pairs in (AB, TEXTS):
        found = cl.sweep(case.model, pairs, case.vectors, multipliers=[0, 1.5], layers=[0, 2, 3], progress=False)
        for row in found.frame.itertuples():
            sides = case.twin.sides(pairs[row.question], [case.step(row.layer, row.multiplier)])
            value = sides[0].exp() if pairs.kind == "ab" else sides[0] - sides[1]
            assert_near(getattr(row, found.metric), value, least=SCORES)


def transfer_layers(case: Case) -> None:
    found = cl.transfer_layers(case.model, TEXTS, case.vectors.at([1]), targets=[0, 3], progress=False)
    direction = case.vectors[1].direction
    for row in found.frame.itertuples():
        sides = case.twin.sides(TEXTS[row.question], [Step(row.target, direction, 0)])
        assert_near(row.score, sides[0] - sides[1], least=SCORES)


def measure_texts(case: Case) -> None:
    answers = [(pair.question, answer) for pair in TEXTS for answer in (pair.positive, pair.negative)]
    found = cl.measures.measure_texts(case.model, answers, progress=False)
    expected = torch.cat([case.twin.sides(pair) for pair in TEXTS])
    assert_near(found["mean_logp"].to_numpy(), expected, least=SCORES)


# ---- interpretation --------------------------------------------------------------------------------------------------


def residual_lens(case: Case) -> None:
    """Every layer, steered and not; at the last one it is the model's own softmax."""
    text = case.twin.text(LONG)
    where = [0, 5, len(text.tokens) - 2, len(text.tokens) - 1]
    found = cl.residual_lens(case.model, LONG, vectors=[(case.vectors[1], 1.5)], positions=where).frame
    for steered, steps in ((False, []), (True, [case.step(1, 1.5, start=text.start)])):
        run = case.twin.run(text.tokens, steps)
        read = found[found["steered"] == steered]
        assert list(read["layer"].unique()) == list(range(case.twin.n_layers))
        said = read[read["layer"] == case.twin.n_layers - 1]
        own = run.logits[where].softmax(-1).max(-1)
        assert list(said["top_token_id"]) == own.indices.tolist()
        assert_near(said["probability"].to_numpy(), own.values, least=1e-6)
        tail = case.twin.tail(run.streams[:, where].flatten(0, 1)).softmax(-1).max(-1)
        assert list(read["top_token_id"]) == tail.indices.tolist()
        assert_near(read["probability"].to_numpy(), tail.values, least=1e-6)


def logit_lens(case: Case) -> None:
    vectors = case.vectors
    expected = {
        "direct": case.twin.linear(vectors.directions),
        "normed": case.twin.uncapped(vectors.directions),
    }
    for reading, logits in expected.items():
        _assert_reads(cl.logit_lens(case.model, vectors, reading=reading, k=40), logits)


def logit_lens_in_context(case: Case) -> None:
    for pairs in (AB, TEXTS):
        found = cl.logit_lens(case.model, case.vectors, reading="in_context", pairs=pairs, k=40)
        states = torch.cat([case.twin.activations(pair) for pair in pairs])  # [state layer d_model]
        shifts = []
        for layer in range(case.twin.n_layers):
            at, v = states[:, layer], case.vectors[layer].direction
            shifts.append((case.twin.tail(at + v) - case.twin.tail(at)).mean(0))
        _assert_reads(found, torch.stack(shifts))


def _assert_reads(lens: Any, logits: Tensor) -> None:
    """A lens' tokens have the twin's scores, and no other token has a larger one."""
    scores = logits - logits.mean(-1, keepdim=True)
    for layer, row in enumerate(scores):
        for side in ("promoted", "suppressed"):
            rows = lens.frame[(lens.frame["layer"] == layer) & (lens.frame["side"] == side)]
            found = torch.tensor(list(rows["score"]))
            best = row.topk(len(rows), largest=side == "promoted").values
            assert_near(found, best, relative=3 * RELATIVE)
            assert_near(found, row[torch.tensor(list(rows["token_id"]))], relative=3 * RELATIVE)


def attribute_logits(case: Case) -> None:
    """The parts add up to the change, block by block; and the change is the twin's."""
    vector, m = case.vectors[1], 1.5
    found = cl.interpretation.attribute_logits(case.model, AB, vector, multiplier=m, progress=False)
    for question, pair in enumerate(AB):
        texts = [case.twin.text(pair.question, answer) for answer in (pair.positive, pair.negative)]
        ids = [text.tokens[text.read[0]] for text in texts]
        asked = texts[0].tokens[: texts[0].read[0]]
        steered = [case.step(1, m, start=texts[0].start)]
        runs = [case.twin.run(asked), case.twin.run(asked, steered)]
        own = torch.stack([run.logits[-1, ids[0]] - run.logits[-1, ids[1]] for run in runs])
        rows = found.frame[found.frame["question"] == question]
        size = float(max(run.logits[-1].abs().max() for run in runs))
        assert_near(rows[["unsteered", "steered"]].iloc[0].to_numpy(float), own, least=RELATIVE * size)
        assert_near(rows["contribution"].sum(), own[1] - own[0], least=10 * RELATIVE * size)

        streams = [run.streams[:, -1] for run in runs]
        wrote = streams[1].diff(dim=0) - streams[0].diff(dim=0)  # by blocks 1, 2, ..
        states = torch.stack([m * vector.direction, *wrote[1:], streams[0][-1]])
        said = case.twin.linear(states)
        said = said[:, ids[0]] - said[:, ids[1]]
        s0, s1 = case.twin.scales(torch.stack([streams[0][-1], streams[1][-1]]))
        expected = [*(said[:-1] / s1), said[-1] * (1 / s1 - 1 / s0)]
        by_layer = rows.groupby(rows["layer"].fillna(case.twin.n_layers))["contribution"].sum()
        assert_near(by_layer.sort_index().to_numpy(float), torch.stack(expected), least=20 * RELATIVE * size)

        at, factor = ATTENTION_WRITES.get(case.name, ("", 1.0))
        attn = [case.twin.attention_writes(asked, steps, at=at, factor=factor)[2:, -1] for steps in ([], steered)]
        said = case.twin.linear(attn[1] - attn[0])
        by_attention = rows[rows["kind"] == "attn"].sort_values("layer")["contribution"].to_numpy(float)
        assert_near(by_attention, (said[:, ids[0]] - said[:, ids[1]]) / s1, least=20 * RELATIVE * size)


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        extract,
        pair_activations,
        token_similarity,
        steer,
        steer_batch,
        steer_generate,
        hook,
        hook_generate,
        generate,
        generate_uncached,
        generate_stream,
        score_answers,
        sweep,
        transfer_layers,
        measure_texts,
        residual_lens,
        logit_lens,
        logit_lens_in_context,
        attribute_logits,
    )
}
by_name = pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
