"""Laws of positions: over odd strings, and over random prompts, paddings, chunks and caches.

The long run, of so many strings through each tokenizer::

    CAA_LENS_FUZZ=10000 python -m pytest tests/test_prompt_laws.py -s
"""

import itertools
import os
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.steering import Kept, streams

from caa_lens.engine.activations import read_residuals
from caa_lens.prompts.batches import left_pad
from caa_lens.prompts.prompt_formats import (
    LLAMA2_BASE,
    LLAMA2_CHAT,
    LLAMA2_CHAT_META,
    chat_template_format,
    encode_answer,
)
from caa_lens.prompts.token_spans import special_tokens

N_STRINGS = int(os.environ.get("CAA_LENS_FUZZ", "300"))
PIECES = [
    *[
        "a",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "(A)",
        "(",
        ")",
        "Why?",
        "the",
        "12",
        "don't",
        "é",
        "日本",
        "😀",
        "ﬁ",
        "ß",
    ],
    *["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "Input:", "Response:", "user\n", "assistant\n", "▁", "Ġ", "<0x0A>"],
    *[
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u00a0",
        "\u2028",
        "\u202e",
        "\u2066",
        "\u0301",
        "\u0307\u0323",
        "\ufe0f",
        "\u00ad",
    ],
    *["\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufffe", "\uffff", "\ufffd", "\U0010ffff", "\U000e0041"],
    *["שלום", "مرحبا", "नमस्ते", "ไทย", "한국어", "👩‍👩‍👧", "🇫🇷", "👍🏽", "𝔘𝔫𝔦", "İı", "e\u0301" * 9, "\u0600", "각"],
    *["{{ x }}", "{% if %}", "</", "<|", "|>", "\\n", "\ue000", "\ud800", "\udfff"],
]


def odd_string(generator, special):
    """A few to some thousand characters: known trouble, special tokens, or any code point at all."""
    kind = generator.random()
    if kind < 0.02:
        return generator.choice([*PIECES, *special]) * generator.randrange(1, 400)
    length = generator.randrange(1, 12)
    if kind < 0.3:
        return "".join(chr(generator.randrange(0x110000)) for _ in range(length))
    return "".join(generator.choice(PIECES if generator.random() < 0.9 else special) for _ in range(length))


def check_law(fmt, tokenizer, question, answer, system):
    """The prompt's tokens are those of its whole text, and its positions are where the characters are."""
    prompt = encode_answer(fmt, tokenizer, question, answer, system=system, warn=False)
    asked = question.strip() if fmt.strip else question
    instruction = fmt.render(asked, system)
    assert prompt.text == instruction + (fmt.separator + answer if answer else "")
    n_bos = int(fmt.prepend_bos)
    assert prompt.tokens[:n_bos] == (tokenizer.bos_token_id,) * n_bos
    whole = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    start = prompt.steer_start - fmt.start_offset
    if fmt.special_tokens_as_text:  # as many control tokens as the format has with other words
        ids = set(tokenizer.convert_tokens_to_ids(special_tokens(tokenizer)))
        usual = replace(fmt, special_tokens_as_text=False)
        plain = encode_answer(usual, tokenizer, "x", "", system="x" if system else None)
        n_control = sum(token in ids for token in plain.tokens) + unknown(tokenizer, prompt)
        assert sum(token in ids for token in prompt.tokens) == n_control
    else:
        assert list(prompt.tokens[n_bos:]) == whole["input_ids"]
        spans = [(0, 0)] * n_bos + whole["offset_mapping"]
        last = len(instruction) - 1  # the instruction's last character, and the last of the tokens that hold it
        assert start == max(i for i, (first, end) in enumerate(spans) if first <= last < end)
        if answer:
            begins = len(prompt.text) - len(answer)
            letter = len(answer) == 3 and answer[0] + answer[2] == "()"
            read = range(begins + letter, begins + (2 if letter else len(answer)))  # characters
            inside = [i for i, (first, end) in enumerate(spans) if first <= read[-1] and end > read[0] and first < end]
            assert prompt.read == (inside[0], inside[-1] + 1)
            behind = [i for i, (_, end) in enumerate(spans) if end > len(instruction)]
            assert prompt.answer_start == behind[0]
    assert 0 <= start < len(prompt)
    assert 0 <= prompt.read[0] < prompt.read[1] <= len(prompt)
    assert start <= prompt.answer_start <= (prompt.read[0] if answer else len(prompt))
    return prompt


def unknown(tokenizer, prompt):
    """Characters without a token of their own are not control tokens, though they share an id with one."""
    as_text = tokenizer(prompt.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return sum(t == tokenizer.unk_token_id for t in as_text)


def without_surrogates(*texts):
    return not any("\ud800" <= character <= "\udfff" for text in texts if text for character in text)


@pytest.mark.parametrize("which", ["SmolLM2", "Llama 2"])
def test_odd_strings_become_a_prompt_whose_positions_hold_or_a_clear_error(which, demo_tokenizer, request):
    if which == "SmolLM2":
        tokenizer, formats = demo_tokenizer, [chat_template_format(demo_tokenizer)]
    else:
        tokenizer = request.getfixturevalue("llama2_tokenizer")
        formats = [LLAMA2_CHAT, LLAMA2_CHAT_META, LLAMA2_BASE]
    special = special_tokens(tokenizer)
    generator = random.Random(which)
    seen = Counter()
    for _ in range(N_STRINGS):
        fmt = replace(
            generator.choice(formats),
            special_tokens_as_text=generator.random() < 0.3,
            start_offset=int(generator.random() < 0.2),
        )
        question = odd_string(generator, special)
        answer = odd_string(generator, special) if generator.random() < 0.7 else ""
        system = odd_string(generator, special) if generator.random() < 0.3 else None
        shown = ascii((fmt.name, question[:80], answer[:80], system and system[:80]))
        if not question.strip():
            expected = "the question is empty" if without_surrogates(answer, system) else "."
        elif not without_surrogates(question, answer, system):
            expected = "half of a surrogate pair"
        else:
            try:
                check_law(fmt, tokenizer, question, answer, system)
            except Exception as error:
                raise AssertionError(f"{shown}: {error!r}") from error
            seen["prompts"] += 1
            seen["as text"] += fmt.special_tokens_as_text and any(s in question + answer for s in special)
            continue
        seen[expected] += 1
        with pytest.raises(ValueError, match=expected):
            encode_answer(fmt, tokenizer, question, answer, system=system, warn=False)
    print(f"\n{which}: {N_STRINGS} strings, {dict(seen)}")
    assert seen["prompts"] > 0.6 * N_STRINGS
    assert seen["half of a surrogate pair"]


@pytest.fixture(scope="module")
def reader(demo_tokenizer, tiny_model):
    return tiny_model(d_vocab=len(demo_tokenizer), n_ctx=512, n_layers=3, tokenizer=demo_tokenizer)


def random_prompts(tokenizer, generator, n):
    fmt = chat_template_format(tokenizer)
    made = []
    while len(made) < n:
        question = " ".join(
            generator.choices(["Why", "日本", "is", "<b>", "😀", "so", "\n", "(A)"], k=generator.randrange(1, 25))
        )
        answer = generator.choice(["(A)", "(B)", "Yes.", "It is so, 日本, and so on.", "\n\nNo", "é"])
        if question.strip():
            made.append(encode_answer(fmt, tokenizer, question, answer))
    return made


def read_at(model, prompt):
    """`read_residuals` of one prompt, obviously: one unpadded forward, and a mean."""
    return streams(model, [prompt.tokens])[:, 0, slice(*prompt.read)].mean(1)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_in_a_padded_batch_is_what_is_read_alone(seed, reader):
    prompts = random_prompts(reader.tokenizer, random.Random(seed), 7)
    with torch.no_grad():
        alone = torch.stack([read_at(reader, prompt) for prompt in prompts])
    for batch_size in (1, 3, 7):
        read = torch.cat(list(read_residuals(reader, prompts, batch_size=batch_size)))
        torch.testing.assert_close(read, alone, atol=2e-5, rtol=2e-5)
    batch = left_pad(prompts, n_ctx=512)
    for row, prompt in enumerate(prompts):
        pad = int(batch.padding[row])
        assert batch.tokens[row, pad:].tolist() == list(prompt.tokens)
        assert int(batch.steer_start[row]) - pad == prompt.steer_start


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_in_chunks_with_a_kv_cache_is_what_is_read_at_once(seed, reader):
    generator = random.Random(seed)
    prompts = random_prompts(reader.tokenizer, generator, 4)
    batch = left_pad(prompts, n_ctx=512)
    length = batch.tokens.shape[1]
    cuts = [0, *sorted(generator.sample(range(1, length), 4)), length]
    kept, pieces = Kept(reader, len(prompts)), []
    with torch.no_grad():
        for first, last in itertools.pairwise(cuts):
            piece = slice(first, last)
            pieces.append(streams(reader, batch.tokens[:, piece], batch.attention_mask[:, piece], kept).movedim(0, 2))
        together = torch.cat(pieces, dim=1)  # [batch pos layer d_model]
        for row, prompt in enumerate(prompts):
            start, stop = (int(batch.padding[row]) + end for end in prompt.read)
            torch.testing.assert_close(together[row, start:stop].mean(0), read_at(reader, prompt), atol=2e-5, rtol=2e-5)
