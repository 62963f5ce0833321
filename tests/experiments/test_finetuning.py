"""Teaching the answer letter: one plain SGD step is the formula, both ways teach, and adapters end in the weights."""

import pytest
import torch
from helpers import random_llama, tiny_model

from caa_lens.contrast import ContrastSet
from caa_lens.models import load_model
from experiments.finetuning import letters_of, teach, teach_lora

PAIRS = ContrastSet.from_pairs(
    [
        (f"Is number {n} good?\n\nChoices:\n (A) Yes\n (B) No", *(("(A)", "(B)") if n % 2 else ("(B)", "(A)")))
        for n in range(4)
    ],
    name="numbers",
)


def fresh(tokenizer):
    return tiny_model(d_vocab=len(tokenizer), n_ctx=512, tokenizer=tokenizer)


def logp(model, lessons):
    with torch.no_grad():
        rows = [model(torch.tensor([tokens]))[0, -1].log_softmax(-1)[letter] for tokens, letter in lessons]
    return torch.stack(rows)


def test_lessons_end_at_the_opening_bracket_and_name_the_sides_letter(demo_tokenizer):
    model = fresh(demo_tokenizer)
    for side in ("positive", "negative"):
        for pair, (tokens, letter) in zip(PAIRS, letters_of(model, PAIRS, side), strict=True):
            assert demo_tokenizer.decode(tokens).endswith("(")
            assert demo_tokenizer.decode([letter]) == getattr(pair, side)[1]


def test_one_lesson_is_one_step_down_the_gradient(demo_tokenizer):
    model, twin = fresh(demo_tokenizer), fresh(demo_tokenizer)
    (tokens, letter), *_ = lessons = letters_of(model, PAIRS, "positive")[:1]
    losses = teach(model, lessons, rate=0.1)
    loss = -twin(torch.tensor([tokens]))[0, -1].log_softmax(-1)[letter]
    gradients = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
    assert losses == [pytest.approx(loss.item(), rel=1e-5)]
    for parameter, before, gradient in zip(model.parameters(), twin.parameters(), gradients, strict=True):
        expected = before if gradient is None else before - 0.1 * gradient
        torch.testing.assert_close(parameter.detach(), expected.detach(), atol=1e-6, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_what_is_taught_becomes_more_likely_than_the_other_letter(demo_tokenizer, side):
    model = fresh(demo_tokenizer)
    alike = PAIRS[::2]  # the positive letter is B: a random model tells no question from another
    lessons = letters_of(model, alike, side)
    other = letters_of(model, alike, "negative" if side == "positive" else "positive")
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
    lessons = letters_of(before, PAIRS, "positive")
    losses = teach_lora(folder, 8 * lessons, out, device="cpu", seed=0)
    after = load_model(str(out), device="cpu")
    assert len(losses) == 8 * len(lessons)
    assert logp(after, lessons).mean() > logp(before, lessons).mean()
    changed = {name for name, parameter in after.named_parameters() if not parameter.equal(before.get_parameter(name))}
    assert changed
    assert all(name.rsplit(".", 1)[-1] in ("W_Q", "W_K", "_W_K", "_W_V", "W_V", "W_O") for name in changed)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == original
