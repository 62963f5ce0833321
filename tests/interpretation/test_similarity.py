"""Token similarity against a plain cache, and pictures that are safe, self-contained and not heavy."""

import json
import re

import pytest
import torch
from helpers.browser import CHROMIUM, browse
from helpers.models import random_vectors
from torch.testing import assert_close

from caa_lens.interpretation import similarity, token_colors
from caa_lens.interpretation.similarity import token_similarity
from caa_lens.interpretation.token_colors import TokenColors, circuitsvis_script
from caa_lens.prompts.prompt_formats import Prompt, default_format
from caa_lens.steering.steered_block import steer
from caa_lens.vectors.steering_vectors import SteeringVector

QUESTION = "How was your day?"
HOSTILE = ("<s>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "&lt;", "<!--", "\u2028", '"')


def plain_prompt(tokens=(5, 9, 3, 17, 60, 9)):
    n = len(tokens)
    return Prompt(text="", tokens=tuple(tokens), steer_start=0, answer_start=n, read=(n - 1, n))


def as_tensor(result, measure):
    return torch.from_numpy(result.summary(measure).to_numpy().copy())  # [pos layer]


def props_of(fragment):
    """What a fragment hands to circuitsvis."""
    return json.loads(re.search(r"const props = (.*);\n", fragment)[1])


def colors(tokens=HOSTILE, labels=("3",)):
    values = tuple((0.5,) * len(labels) for _ in tokens)
    return TokenColors(caption="<b>caption</b>", tokens=tuple(tokens), values=values, labels=labels, bound=1.0)


def test_both_measures_equal_a_computation_from_the_whole_cache(tiny):
    vectors, prompt = random_vectors(tiny), plain_prompt()
    result = token_similarity(tiny, prompt, vectors)
    _, cache = tiny.run_with_cache(torch.tensor([prompt.tokens]))
    for column, layer in enumerate(range(5)):
        resid, v = cache["resid_post", layer][0], vectors[layer].direction
        dot = torch.stack([h @ v for h in resid])
        cosine = torch.stack([h @ v / (h.norm() * v.norm()) for h in resid])
        assert_close(as_tensor(result, "dot")[:, column], dot, atol=1e-4, rtol=1e-4)
        assert_close(as_tensor(result, "cosine")[:, column], cosine, atol=1e-5, rtol=1e-4)


def test_a_vector_that_is_a_tokens_own_residual_has_cosine_one_there_and_nowhere_else(tiny):
    prompt = plain_prompt()
    _, cache = tiny.run_with_cache(torch.tensor([prompt.tokens]))
    own = cache["resid_post", 3][0, 4]
    frame = token_similarity(tiny, prompt, SteeringVector.from_direction(own, layer=3)).frame
    assert frame["cosine"][4] == pytest.approx(1, abs=1e-5)
    assert frame["dot"][4] == pytest.approx(float(own @ own), rel=1e-4)
    assert (frame["cosine"].drop(4) < 0.999).all()


def test_cosine_ignores_the_vectors_length_and_dot_is_linear_in_it(tiny):
    v = random_vectors(tiny)[2]
    once, thrice = (token_similarity(tiny, plain_prompt(), vector) for vector in (v, -3.0 * v))
    assert_close(as_tensor(thrice, "cosine"), -as_tensor(once, "cosine"), atol=1e-5, rtol=1e-4)
    assert_close(as_tensor(thrice, "dot"), -3 * as_tensor(once, "dot"), atol=1e-4, rtol=1e-4)


def test_layers_are_never_mislabelled_when_only_some_were_extracted(tiny):
    vectors = random_vectors(tiny)
    whole = token_similarity(tiny, plain_prompt(), vectors)
    part = token_similarity(tiny, plain_prompt(), vectors.at([1, 3, 4]), layers=[4, 1])
    assert part.layers == (1, 4)
    assert_close(as_tensor(part, "dot"), as_tensor(whole, "dot")[:, [1, 4]], atol=1e-4, rtol=1e-4)
    with pytest.raises(IndexError, match="no vector for layer 2"):
        token_similarity(tiny, plain_prompt(), vectors.at([1, 3]), layers=[2])


def test_a_question_is_put_into_the_models_format_and_raw_text_is_not(tiny_chat):
    vectors = random_vectors(tiny_chat)[1]
    asked = token_similarity(tiny_chat, QUESTION, vectors, answer="Fine.")
    prompt = default_format(tiny_chat).encode(tiny_chat.tokenizer, QUESTION, "Fine.")
    assert tuple(asked.frame["token_id"]) == prompt.tokens
    assert asked.answer_start == prompt.answer_start
    assert asked.frame["token"][0] == "<|im_start|>"
    assert_close(as_tensor(token_similarity(tiny_chat, prompt, vectors), "dot"), as_tensor(asked, "dot"))
    raw = token_similarity(tiny_chat, QUESTION, vectors, raw_text=True)
    assert list(raw.frame["token_id"]) == tiny_chat.tokenizer(QUESTION)["input_ids"]
    assert raw.answer_start == len(raw.pieces)
    assert "".join(raw.pieces) == QUESTION


def test_the_text_is_unsteered_unless_the_caller_steers(tiny):
    vectors, prompt = random_vectors(tiny), plain_prompt()
    before = as_tensor(token_similarity(tiny, prompt, vectors[3]), "dot")
    with steer(tiny, vectors[2], start=3):
        during = as_tensor(token_similarity(tiny, prompt, vectors[3]), "dot")
    assert_close(during[:3], before[:3])
    assert (during[3:] != before[3:]).all()
    assert_close(as_tensor(token_similarity(tiny, prompt, vectors[3]), "dot"), before, rtol=0, atol=0)


def test_no_token_becomes_markup_and_none_is_changed_for_the_eye():
    fragment = colors().to_html(full_page=False, script=False)
    assert "<b>" not in fragment
    assert fragment.count("<script") == fragment.count("</script") == 1
    assert "<!--" not in fragment
    tokens = props_of(fragment)["tokens"]
    for (
        token
    ) in tokens:  # innerHTML opens a tag at `<` with a letter, `/`, `!` or `?`, an entity at `&` with one or `#`
        assert not re.search(r"<[a-zA-Z/!?]|&[a-zA-Z0-9#]", token)
    assert tuple(token.replace("\u200b", "") for token in tokens) == HOSTILE


@pytest.mark.parametrize("labels", [("3",), ("1", "3", "4")])
def test_a_page_is_self_contained_and_has_the_script_once(labels, tmp_path):
    page = colors(labels=labels).save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("var CircuitsVis") == 1
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)
    assert "unpkg" not in page
    assert "sourceMappingURL" not in page
    assert page.count("<script>\n") == page.count("</script>") == 2


def test_only_the_first_picture_of_a_process_carries_the_script(monkeypatch):
    monkeypatch.setattr(token_colors, "_script_sent", False)
    first, second = colors()._repr_html_(), colors()._repr_html_()
    assert circuitsvis_script(packed=True) in first
    assert len(first) < 600_000
    assert len(second) < 10_000
    assert "window.caaLensCircuitsVis" in second
    assert circuitsvis_script(packed=True) in colors().to_html(full_page=False, script=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which runs the pictures' scripts")
def test_in_a_notebook_pictures_are_circuitsvis_even_if_the_first_ones_output_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(token_colors, "_script_sent", False)
    first, second, third = (colors(labels=labels)._repr_html_() for labels in (("3",), ("1", "3"), ("4",)))
    late = json.dumps(third).replace("<", "\\u003c")
    # As a front end does: an output is put in, and its scripts are made anew, which runs them.
    page = f"""<!doctype html><meta charset="utf-8"><div id="one">{first}</div><div id="two">{second}</div>
    <div id="three"></div>
    <script>setTimeout(() => {{
      document.getElementById("one").remove();
      const output = document.getElementById("three");
      output.innerHTML = {late};
      for (const old of output.querySelectorAll("script")) {{
        const script = document.createElement("script");
        script.textContent = old.textContent;
        old.replaceWith(script);
      }}
    }}, 2000);</script>"""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    document, said, requests = browse(tmp_path / "page.html", tmp_path)
    assert not [line for line in said if "WebGL" not in line]  # what circuitsvis holds asks for a card
    assert not requests
    seen = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    two, three = seen.split('id="two"')[1].split('id="three"')
    for drawn in (two, three):
        assert "&lt;\u200bs&gt;" in drawn  # circuitsvis' tokens, and not the still picture's
        assert "white-space: pre-wrap" not in drawn


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, which runs the pictures' scripts")
def test_without_circuitsvis_on_the_page_a_picture_still_has_its_tokens_in_colour(tmp_path):
    fragment = colors(labels=("1", "3", "4")).to_html(full_page=False, script=False)
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset='utf-8'>{fragment}", encoding="utf-8")
    document, said, _ = browse(tmp_path / "page.html", tmp_path)
    assert not said
    seen = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert seen.count("background: rgba(59, 125, 216, 0.35)") == len(HOSTILE)
    assert "&lt;img src=x onerror=alert(1)&gt;" in seen
    assert "Shown: 3. To choose another one" in seen


def test_colours_are_symmetric_and_the_first_token_is_shown_but_does_not_scale_them(tiny):
    result = token_similarity(tiny, plain_prompt(), random_vectors(tiny), measure="dot")
    result.frame.loc[result.frame["position"] == 0, "dot"] = 1e6  # an attention sink
    limit = float(as_tensor(result, "dot")[1:].abs().max())
    several = props_of(result.to_html(full_page=False, script=False))
    assert several["positiveBounds"] == pytest.approx([limit] * 5)
    assert several["negativeBounds"] == pytest.approx([-limit] * 5)
    assert several["labels"] == ["0", "1", "2", "3", "4"]
    assert several["values"][0] == [1e6] * 5
    one = props_of(result.show(2, skip_first=False)._fragment())
    assert (one["minValue"], one["maxValue"]) == (-1e6, 1e6)
    assert one["values"] == pytest.approx(as_tensor(result, "dot")[:, 2].tolist(), rel=1e-3)
    assert props_of(result.show(2, measure="cosine", bound=0.5)._fragment())["maxValue"] == 0.5
    heat = result.plot().data[0]
    assert (heat.zmin, heat.zmax) == pytest.approx((-limit, limit))


def test_the_heat_map_escapes_tokens_and_has_a_row_a_token(tiny_chat):
    result = token_similarity(tiny_chat, "a <b>bold</b> claim & more", random_vectors(tiny_chat), raw_text=True)
    figure = result.plot()
    assert figure.data[0].z.shape == (len(result.pieces), 5)
    assert_close(torch.from_numpy(figure.data[0].z[:, 3].copy()), as_tensor(result, "cosine")[:, 3])
    assert not any("<" in label for label in figure.layout.yaxis.ticktext)


def test_bad_requests_are_refused(tiny_chat, tiny, tiny_model):
    vectors = random_vectors(tiny_chat)
    with pytest.raises(ValueError, match="unknown measure 'angle': expected one of cosine, dot"):
        token_similarity(tiny_chat, QUESTION, vectors, measure="angle")
    with pytest.raises(ValueError, match="got an answer for raw text"):
        token_similarity(tiny_chat, QUESTION, vectors, answer="Fine.", raw_text=True)
    with pytest.raises(ValueError, match="got a system prompt for a Prompt"):
        token_similarity(tiny_chat, plain_prompt(), vectors, system="Be brief.")
    with pytest.raises(ValueError, match="the text is empty"):
        token_similarity(tiny_chat, " ", vectors, raw_text=True)
    with pytest.raises(ValueError, match="vectors have d_model=64"):
        token_similarity(tiny, plain_prompt(), random_vectors(tiny_model(d_model=64)))
    with pytest.raises(ValueError, match="the vector of layer 2 is zero"):
        token_similarity(tiny, plain_prompt(), SteeringVector.from_direction(torch.zeros(32), layer=2))
    with pytest.raises(TypeError, match="no tokenizer"):
        token_similarity(tiny, "text", random_vectors(tiny), raw_text=True)
    result = token_similarity(tiny, plain_prompt(), random_vectors(tiny))
    with pytest.raises(ValueError, match="layer 7 was not computed"):
        result.show(7)
    with pytest.raises(ValueError, match="bound must be positive, got 0"):
        result.show(2, bound=0)


def test_llama_2s_words_keep_their_blanks(llama2_tokenizer):
    ids = llama2_tokenizer("A good day\nat sea")["input_ids"]
    assert "".join(similarity._piece(llama2_tokenizer, i) for i in ids[1:]) == " A good day\\n\nat sea"


def test_praise_resembles_the_sentiment_vector_more_than_blame(demo_model):
    from caa_lens.contrast.sets import ContrastSet
    from caa_lens.vectors.extraction import extract

    vectors = extract(demo_model, ContrastSet.load("sentiment").sample(30, seed=0), layers=[14, 20], progress=False)
    praise, blame = (
        token_similarity(demo_model, "How was the film?", vectors, answer=answer)
        for answer in ("It was wonderful, I loved it.", "It was terrible, I hated it.")
    )
    means = [
        result.summary()[lambda table, first=result.answer_start: table.index >= first].mean()
        for result in (praise, blame)
    ]
    assert (means[0] > means[1] + 0.03).all()
