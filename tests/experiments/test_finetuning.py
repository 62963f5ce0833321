"""Teaching the answer letter: one plain SGD step is the formula, both ways teach, and adapters end in the weights.

Then in a run: letters and text of taught models, ours beside the paper's, and what a killed process leaves.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import SHARED, known_as, random_llama, tiny_model

from caa_lens.contrast.sets import ContrastSet
from caa_lens.measures import answers
from caa_lens.models.loading import weights
from caa_lens.models.loading.load import load_model
from caa_lens.models.loading.weights import checkpoint_parameters
from caa_lens.paper.numbers import published
from caa_lens.prompts.prompt_formats import LLAMA2_CHAT, encode_letters, resolve_format
from caa_lens.report.runs import load_section
from caa_lens.steering import generation
from experiments.catalogue import EXPERIMENTS
from experiments.paper import section_3_vectors as extraction
from experiments.paper import tables_4_10_13_finetuned_text as finetuned_text
from experiments.paper import tables_4_10_13_finetuning as finetuning
from experiments.paper.tables_4_10_13_finetuning import letters_of, taught, teach, teach_lora
from experiments.running.context import Context
from experiments.running.identity import run_identity
from experiments.running.run_folder import RunFolder
from experiments.running.runner import run, with_needs
from experiments.running.settings import RunConfig
from experiments.running.units import Unit

PAIRS = ContrastSet.from_pairs(
    [
        (f"Is number {n} good?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(4)
    ],
    name="numbers",
)


def lessons_for(model, pairs, side):
    return letters_of(model.tokenizer, pairs, side, resolve_format(model, None))


def fresh(tokenizer):
    return tiny_model(d_vocab=len(tokenizer), n_ctx=512, tokenizer=tokenizer)


def logp(model, lessons):
    with torch.no_grad():
        rows = [model(torch.tensor([tokens]))[0, -1].log_softmax(-1)[letter] for tokens, letter in lessons]
    return torch.stack(rows)


def test_lessons_end_at_the_opening_bracket_and_name_the_sides_letter(demo_tokenizer):
    model = fresh(demo_tokenizer)
    for side in ("positive", "negative"):
        for pair, (tokens, letter) in zip(PAIRS, lessons_for(model, PAIRS, side), strict=True):
            assert demo_tokenizer.decode(tokens).endswith("(")
            assert demo_tokenizer.decode([letter]) == getattr(pair, side)[1]


def test_one_lesson_is_one_step_down_the_gradient(demo_tokenizer):
    model, twin = fresh(demo_tokenizer), fresh(demo_tokenizer)
    (tokens, letter), *_ = lessons = lessons_for(model, PAIRS, "positive")[:1]
    losses = teach(model, lessons, rate=0.1)
    loss = -twin(torch.tensor([tokens]))[0, -1].log_softmax(-1)[letter]
    gradients = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
    assert losses == [pytest.approx(loss.item(), rel=1e-5)]
    biases = 0
    for (name, parameter), before, gradient in zip(model.named_parameters(), twin.parameters(), gradients, strict=True):
        of_llama = ".b_" not in name and "._b_" not in name
        biases += not of_llama and gradient is not None and bool(gradient.any())
        expected = before - 0.1 * gradient if of_llama else before
        torch.testing.assert_close(parameter.detach(), expected.detach(), atol=1e-6, rtol=1e-5)
    assert biases > 10  # which would have moved, and no Llama has them
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def of_hugging_face(model):
    """Every weight of a HookedTransformer by Hugging Face's name, in its layout."""
    views = {"_transposed": lambda w: w.T, "_heads_in": lambda w: w.transpose(1, 2).flatten(0, 1)}
    views |= {"_heads_out": lambda w: w.permute(2, 0, 1).flatten(1), "_as_is": lambda w: w}
    return {hf: views[view.__name__](model.get_parameter(tl)) for hf, _, tl, view in weights._parameter_map(model.cfg)}


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}], ids=str)
@pytest.mark.parametrize("ungrouped", [False, True])
def test_a_model_is_taught_as_transformers_would(tmp_path, shape, ungrouped):
    hf = random_llama(tmp_path, **shape)
    before = {name: parameter.detach().clone() for name, parameter in hf.named_parameters()}
    model = load_model(tmp_path, device="cpu")
    model.set_ungroup_grouped_query_attention(ungrouped)
    rng = np.random.default_rng(0)
    lessons = [(rng.integers(0, 64, n).tolist(), int(rng.integers(64))) for n in (9, 5, 12, 7)]
    losses = teach(model, lessons, rate=0.05)
    optimizer = torch.optim.SGD(hf.parameters(), lr=0.05)
    with torch.enable_grad():
        for tokens, letter in lessons:
            loss = -hf(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[letter]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert losses.pop(0) == pytest.approx(loss.item(), rel=1e-4)
    ours, theirs = of_hugging_face(model), dict(hf.named_parameters())
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=1e-5)
        assert (parameter - before[name]).abs().max() > 1e-3, name  # it was taught
    if shape.get("tie_word_embeddings"):
        assert torch.equal(model.unembed.W_U, model.embed.W_E.T)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if ".b_" in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_as_its_steps_would_be_rounded_away(demo_tokenizer, dtype):
    model = tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, tokenizer=demo_tokenizer, dtype=dtype)
    with pytest.raises(ValueError, match=r"got a model in \w+16, expected float32: nearly all steps would be rounded"):
        teach(model, lessons_for(model, PAIRS, "positive"), rate=1e-4)


def test_embeddings_that_are_tied_in_name_only_are_refused(tmp_path):
    random_llama(tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, device="cpu")
    model.unembed.W_U.data = model.unembed.W_U.data.clone()
    with pytest.raises(ValueError, match="W_E and W_U are two tensors, expected one piece of memory"):
        teach(model, [([1, 2], 3)], rate=1e-4)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_what_is_taught_becomes_more_likely_than_the_other_letter(demo_tokenizer, side):
    model = fresh(demo_tokenizer)
    alike = PAIRS[::2]  # the positive letter is B: a random model tells no question from another
    lessons = lessons_for(model, alike, side)
    other = lessons_for(model, alike, "negative" if side == "positive" else "positive")
    before = (logp(model, lessons) - logp(model, other)).mean()
    teach(model, 20 * lessons, rate=0.1)
    assert (logp(model, lessons) - logp(model, other)).mean() > before + 0.1


def test_adapters_are_merged_into_a_folder_that_loads(demo_tokenizer, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'caa-lens[finetune]'")
    folder, out = tmp_path / "model", tmp_path / "taught"
    random_llama(folder, vocab_size=len(demo_tokenizer), max_position_embeddings=512)
    demo_tokenizer.save_pretrained(folder)
    original = {file.name: file.read_bytes() for file in folder.iterdir()}
    before = load_model(str(folder), device="cpu")
    lessons = lessons_for(before, PAIRS, "positive")
    losses = teach_lora(folder, 8 * lessons, out, device="cpu", seed=0)
    after = load_model(str(out), device="cpu")
    assert len(losses) == 8 * len(lessons)
    assert logp(after, lessons).mean() > logp(before, lessons).mean()
    changed = {name for name, parameter in after.named_parameters() if not parameter.equal(before.get_parameter(name))}
    assert changed
    assert all(name.rsplit(".", 1)[-1] in ("W_Q", "W_K", "_W_K", "_W_V", "W_V", "W_O") for name in changed)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == original


# ---- in a run --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
PAPER_7B = RunConfig.of("meta-llama/Llama-2-7b-chat-hf", "paper", judge="j", judge_url="http://h/v1")


def settings(models, **given):
    sizes = {"n_generate": 4, "n_test": 3, "n_prompts": 2, "max_new_tokens": 4, "layer": 1}
    return RunConfig.of(str(models / "chat"), behaviors=("refusal", "sentiment"), **sizes | given)


def fake_judge(items, rubric, **_):
    """Scores that depend on the text alone."""
    scores = [float(sum(map(ord, answer)) % 11) for answer in items["answer"]]
    return SimpleNamespace(frame=items.assign(score=scores, raw="", attempts=1, error=""))


def start(config, path, *experiments):
    folder = RunFolder(path)
    folder.claim(run_identity(config), {})
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("caa_lens.measures.open_ended.judging.judge_texts", fake_judge)
        outcomes = run(with_needs(experiments, EXPERIMENTS, config), config, folder)
    assert not any(o.failed or o.skipped or o.unfinished for o in outcomes), outcomes
    return folder


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    config = settings(models, judge="a judge", judge_url="http://h:1/v1")
    return config, start(config, tmp_path_factory.mktemp("taught") / "run", finetuned_text.JUDGED)


def tables(folder, name):
    return dict(load_section(folder.section_file(name)).captioned_tables())


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_letters_and_texts_of_a_run_are_those_of_the_taught_model(finished, side):
    from caa_lens import generate
    from caa_lens.measures.answers import score_answers

    config, folder = finished
    context = Context(config, folder)
    sets, vector = context.sets("refusal"), context.vectors("refusal")[1]
    model = load_model(config.model, dtype="float32")
    lessons = lessons_for(model, sets.generate, side)
    teach(model, [lessons[i] for i in np.random.default_rng(0).permutation(4)], rate=1e-4)
    frame = folder.load("finetuning", Unit.of(behavior="refusal", finetune=side))
    expected = score_answers(model, sets.test, [()], progress=False).values[:, 0]
    np.testing.assert_allclose(frame[frame["multiplier"] == 0]["score"], expected, atol=1e-5)
    for m, vectors in ((-1.0, [(vector, -1.0)]), (0.0, []), (1.0, [(vector, 1.0)])):
        texts = folder.load("finetuned_text", Unit.of(behavior="refusal", finetune=side, multiplier=m))
        assert list(texts["question"]) == list(sets.open_ended)
        assert list(texts["answer"]) == generate(model, sets.open_ended, vectors=vectors, max_new_tokens=4)
        assert texts["mean_logp"].notna().all()


def test_the_untaught_models_scores_are_those_of_the_judged_experiment(finished):
    _, folder = finished
    for m in (-1.0, 0.0, 1.0):
        ours = folder.load("finetuned_judged", Unit.of(behavior="refusal", finetune="none", multiplier=m))
        pd.testing.assert_frame_equal(ours, folder.load("judged", Unit.of(behavior="refusal", multiplier=m)))
    table = tables(folder, "finetuned_judged")["Mean score (0 to 10), 95 % interval, number of answers"]
    assert list(table["finetune"]) == ["none", "positive", "negative"]
    for side in ("positive", "negative"):
        unit = Unit.of(behavior="refusal", finetune=side, multiplier=1.0)
        texts = folder.load("finetuned_text", unit)
        expected = fake_judge(texts, "").frame["score"]
        assert list(folder.load("finetuned_judged", unit)["score"]) == list(expected)
        assert table.set_index("finetune").loc[side, "+1"].startswith(f"{expected.mean():.2f} [")
    assert "sentiment" not in set(table["behavior"])  # it is not answered by letter


def test_without_a_judge_there_are_texts_and_measures_alone(models, tmp_path):
    config = settings(models, n_prompts=1)
    folder = start(config, tmp_path / "run", finetuned_text.EXPERIMENT)
    section = load_section(folder.section_file("finetuned_text"))
    (group,) = section.texts
    assert [label for label, _ in group[1]] == [
        f"taught {side}, {m}" for side in ("positive", "negative") for m in ("-1", "+0", "+1")
    ]
    assert list(tables(folder, "finetuned_text")["Mean over prompts (n)"]["n"]) == [1] * 6
    assert finetuned_text.JUDGED.skip(config) == "no judge was given: name one with --judge and --judge-url"


def test_accuracy_is_the_share_of_questions_answered_as_taught_unsteered():
    rows = pd.DataFrame(
        {
            "behavior": "refusal",
            "finetune": ["positive"] * 5 + ["negative"] * 5,
            "multiplier": [0.0, 0.0, 0.0, 0.0, 1.0] * 2,
            "score": [0.6, 0.9, 0.4, 0.5, 0.0, 0.5, 0.9, 0.4, 0.1, 0.0],
        }
    )
    table = finetuning.accuracy(rows).set_index("finetune")
    assert table["n"].tolist() == [4, 4]
    assert table["mean"].tolist() == [0.5, 0.5]  # a half is no answer
    assert table.loc["positive", ["low", "high"]].tolist() == pytest.approx([0.15, 0.85], abs=0.005)  # Wilson, 2 of 4
    sure = finetuning.accuracy(rows[rows["finetune"] == "negative"].assign(score=0.0)).iloc[0]
    assert (sure["mean"], sure["high"]) == (1.0, pytest.approx(1.0))
    assert sure["low"] == pytest.approx(0.51, abs=0.005)  # Wilson, 4 of 4


def as_published(table, columns):
    """Frames of units whose means are the paper's numbers, so that every cell must meet its own."""
    numbers = published(table, PAPER_7B.model_name)
    return {Unit.of(**{name: getattr(row, name) for name in columns}): row for row in numbers.itertuples(index=False)}


def test_all_cells_of_the_papers_tables_are_met(monkeypatch):
    judged = {}
    for unit, row in as_published("finetune_open_ended", ["behavior", "finetune", "multiplier"]).items():
        scores = {"prompt": [0, 1], "score": [row.value, row.value], "raw": "", "attempts": 1, "error": ""}
        judged[unit] = pd.DataFrame({**scores, "again": False, "layer": 13})
    assert len(judged) == 63
    monkeypatch.setattr(finetuned_text, "judged_units", lambda config: list(judged))  # without the paper's data
    found = dict(finetuned_text.section_judged(judged, PAPER_7B).captioned_tables())["Beside the paper's, cell by cell"]
    assert len(found) == 63
    assert found["difference"].abs().max() < 1e-9
    assert set(found["paper within interval"]) == {"yes"}

    taught = {}
    shares = published("finetune_accuracy", PAPER_7B.model_name).set_index(["behavior", "finetune"])["value"]
    for behavior, side in shares.index:
        right = np.arange(50) < round(50 * shares[behavior, side])
        score = np.where(right == (side == "positive"), 0.9, 0.1)
        part = [
            pd.DataFrame({"layer": 13, "multiplier": m, "question": range(50), "metric": "p_matching", "score": score})
            for m in (-1.0, 0.0, 1.0)
        ]
        taught[Unit.of(behavior=behavior, finetune=side)] = pd.concat(part)
    captioned = dict(finetuning.section(taught, PAPER_7B).captioned_tables())
    (accuracy,) = [table for caption, table in captioned.items() if caption.startswith("Share of held-out questions")]
    assert len(accuracy) == 14
    assert accuracy["difference"].abs().max() < 1e-9
    assert len(captioned["Beside the paper's, cell by cell"]["paper"].dropna()) == 42


def test_adapters_are_trained_in_a_run_and_leave_no_weights_behind(models, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'caa-lens[finetune]'")
    config = settings(models, finetune="lora", n_prompts=1)
    folder = start(config, tmp_path / "run", finetuned_text.EXPERIMENT)
    full = start(settings(models, n_prompts=1), tmp_path / "full", finetuning.EXPERIMENT)
    unit = Unit.of(behavior="refusal", finetune="positive")
    assert not np.allclose(
        folder.load("finetuning", unit)["score"], full.load("finetuning", unit)["score"], rtol=0, atol=1e-7
    )
    assert "rank-8 adapters" in load_section(folder.section_file("finetuning")).text
    assert {file.parent.name for file in folder.path.rglob("*.safetensors")} == {"vectors"}
    assert not list(folder.path.glob("finetuning/artefacts/tmp*"))


def test_a_run_in_half_precision_teaches_and_asks_in_float32(models, tmp_path):
    unit = Unit.of(behavior="refusal", finetune="negative")
    found = {}
    for dtype in ("float32", "float16"):
        config = settings(models, dtype=dtype, n_prompts=1, data="bundled")
        folder = start(config, tmp_path / dtype, finetuning.EXPERIMENT)
        frame = folder.load("finetuning", unit)
        found[dtype] = frame[frame["multiplier"] == 0]["score"].to_numpy()
        with torch.no_grad():
            model, _ = taught(Context(config, folder), unit)
        assert model.W_E.dtype == model.cfg.dtype == torch.float32
        untaught = load_model(config.model, dtype="float32")
        pairs = zip(checkpoint_parameters(model).values(), checkpoint_parameters(untaught).values(), strict=True)
        moved = [float(after.ne(before).float().mean()) for after, before in pairs]
        assert max(moved) > 0.3
        assert finetuning.weights(config) == pytest.approx({"float32": 1.1, "float16": 2.2}[dtype])
    np.testing.assert_array_equal(found["float16"], found["float32"])  # unsteered, no half precision is in it
    assert (
        "Taught and asked in float32, in the prompt format chat-template."
        in load_section(folder.section_file("finetuning")).text
    )


@pytest.fixture(scope="module")
def llama2(tmp_path_factory, llama2_tokenizer):
    """A random Llama of Llama 2's vocabulary and name, with Meta's bare tokenizer.model alone."""
    folder = tmp_path_factory.mktemp("meta") / "Llama-2-7b-chat-hf"
    random_llama(folder, vocab_size=32000, max_position_embeddings=512, num_hidden_layers=2)
    known_as(folder, "meta-llama/Llama-2-7b-chat-hf")
    shutil.copy(SHARED / "llama2_tokenizer" / "tokenizer.model", folder)
    return folder


def noting(teacher, lessons):
    """A teacher that writes down what it teaches."""

    def teaches(of, given, *rest, **options):
        lessons.extend(given)
        return teacher(of, given, *rest, **options)

    return teaches


@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_a_taught_llama_2_is_asked_in_the_format_and_the_tokens_that_it_was_taught_in(
    llama2, tmp_path, monkeypatch, finetune
):
    if finetune == "lora":
        pytest.importorskip("peft", reason="needs peft: pip install 'caa-lens[finetune]'")
    sizes = {"n_generate": 4, "n_test": 3, "n_prompts": 2, "max_new_tokens": 2, "layer": 1, "base_model": "none"}
    config = RunConfig.of(str(llama2), "small", data="bundled", behaviors=("refusal",), finetune=finetune, **sizes)
    folder = start(config, tmp_path / "run", extraction.EXPERIMENT)
    lessons, asked, generated = [], [], []
    for name in ("teach", "teach_lora"):
        monkeypatch.setattr(finetuning, name, noting(getattr(finetuning, name), lessons))
    real_encode, real_generate = answers._encode, generation.generate

    def encode(model, pairs, prompt_format, system):
        asked.extend(encode_letters(prompt_format, model.tokenizer, pair.question, ["A", "B"]) for pair in pairs)
        return real_encode(model, pairs, prompt_format, system)

    def generate(model, prompts, **options):
        generated.append(
            (model.cfg.model_name, options["prompt_format"].name, model.tokenizer("[INST] a")["input_ids"])
        )
        return real_generate(model, prompts, **options)

    monkeypatch.setattr(answers, "_encode", encode)
    monkeypatch.setattr(generation, "generate", generate)
    unit = Unit.of(behavior="refusal", finetune="positive")
    context = Context(config, folder)
    with torch.no_grad():
        frame = finetuning.run(unit, context)
    assert (frame.attrs["prompt_format"], frame.attrs["model"]) == ("llama2-chat", llama2.name)
    tokenizer = load_model(llama2).tokenizer
    sets = context.sets("refusal")
    for given, pairs in (([tokens for tokens, _ in lessons], sets.generate), ([p.tokens for p, _ in asked], sets.test)):
        expected = [encode_letters(LLAMA2_CHAT, tokenizer, pair.question, ["A", "B"])[0].tokens for pair in pairs]
        assert sorted(map(tuple, given)) == sorted(expected)
    assert {ids for _, ids in asked} <= {tuple(tokenizer.convert_tokens_to_ids(["A", "B"]))}
    assert {letter for _, letter in lessons} <= set(tokenizer.convert_tokens_to_ids(["A", "B"]))
    assert generated == [(llama2.name, "llama2-chat", tokenizer("[INST] a")["input_ids"])] * 3


def test_weights_that_a_killed_process_left_are_swept_up_at_the_next_start_and_nothing_else(tmp_path):
    from helpers import cheap_run as cheap

    folder, unit = RunFolder(tmp_path / "run"), Unit.of(behavior="a", finetune="positive")
    cheap.claim(folder)
    left = folder.artefacts("finetuning") / f"tmp-{unit.name}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"weights")
    kept = folder.artefacts("finetuning") / "answers-x.parquet"
    kept.write_bytes(b"answers")
    run([], cheap.CONFIG, folder)
    assert not left.exists()
    assert kept.exists()
    with folder.scratch("finetuning", unit) as scratch:
        assert scratch == left
        assert not list(scratch.iterdir())
    assert not scratch.exists()


def test_answers_that_are_missing_are_named_with_the_remedy(finished, tmp_path):
    config, _ = finished
    unit = Unit.of(behavior="refusal", finetune="positive", multiplier=1.0)
    with pytest.raises(FileNotFoundError, match=r"answers-behavior=refusal.*delete .*units.*to have them made again"):
        finetuned_text.run(unit, Context(config, RunFolder(tmp_path)))
