"""The explorer in a notebook: its controls write the same texts as the library, here and in a real kernel."""

import asyncio
import re
from html import unescape

import pytest
from helpers.models import demo_folder, random_vectors

import caa_lens as cl

ipywidgets = pytest.importorskip("ipywidgets", reason="needs ipywidgets, of the extra explore")
pytestmark = pytest.mark.one_kind
QUESTION = "How was your day?"


def text_of(explorer, side):
    html = re.sub(r'<span class="cut">.*?</span>', "", explorer.html_of(side))
    return unescape(re.sub(r"<[^>]*>", "", html))


@pytest.fixture
def explorer(tiny_chat):
    found = cl.explore(tiny_chat, random_vectors(tiny_chat, layers=[1, 3]), layer=3, multiplier=2.0, max_new_tokens=20)
    found.session._controls = 0  # quicker
    return found


def test_a_click_writes_what_generate_writes_and_a_slider_writes_anew(explorer):
    model, vectors = explorer.session.model, explorer.session.vectors

    async def scene():
        explorer.write_button.click()
        await explorer.done()
        yield_ = text_of(explorer, "unsteered"), text_of(explorer, "steered"), explorer.lens_html
        explorer.layer.value = 1
        await explorer.done()
        return yield_, (text_of(explorer, "steered"), explorer.lens_html)

    (plain, steered, lens), (moved, other_lens) = asyncio.run(scene())
    assert plain == cl.generate(model, QUESTION, max_new_tokens=20)
    assert steered == cl.generate(model, QUESTION, vectors=[(vectors[3], 2.0)], max_new_tokens=20)
    assert moved == cl.generate(model, QUESTION, vectors=[(vectors[1], 2.0)], max_new_tokens=20)
    assert "Layer 3" in lens
    assert "Layer 1" in other_lens
    assert explorer.messages == ()
    assert "rgba" in explorer.html_of("steered")


def test_stop_is_possible_while_a_text_is_written_and_only_then(explorer):
    async def scene():
        assert explorer.stop_button.disabled
        explorer.max_new_tokens.value = 200
        await asyncio.sleep(0)
        while "<span" not in explorer.html_of("steered"):
            await asyncio.sleep(0)
        assert not explorer.stop_button.disabled
        explorer.stop_button.click()
        await explorer.done()

    asyncio.run(scene())
    assert explorer.stop_button.disabled
    assert "stopped" in explorer.html_of("steered")
    assert explorer.html_of("steered").count("<span") < 100


def test_what_cannot_be_written_is_said_below_the_buttons(explorer):
    async def scene():
        explorer.prompt.value = " "
        explorer.write_button.click()
        await explorer.done()

    asyncio.run(scene())
    assert explorer.messages == ("the prompt is empty: write a question",)
    assert "the prompt is empty" in explorer._status.value


def test_without_an_event_loop_a_click_says_what_is_missing(explorer):
    explorer.write_button.click()
    assert "needs a notebook" in explorer._status.value


def test_the_sliders_have_the_vectors_layers_and_the_range_that_was_asked_for(tiny_chat):
    found = cl.explore(tiny_chat, random_vectors(tiny_chat, layers=[1, 3]), multipliers=(-2, 5), multiplier=-1)
    assert list(found.layer.options) == [1, 3]
    assert (found.multiplier.min, found.multiplier.max, found.multiplier.value) == (-2, 5, -1)
    assert found.layer.value in (1, 3)
    assert "caa-lens explore" in repr(found)
    assert "application/vnd.jupyter.widget-view+json" in found._repr_mimebundle_()
    with pytest.raises(ValueError, match="max_new_tokens must be at most 512, got 513"):  # the model's context
        cl.explore(tiny_chat, random_vectors(tiny_chat), max_new_tokens=513)
    with pytest.raises(ValueError, match="multiplier must be from -4 to 4"):
        cl.explore(tiny_chat, random_vectors(tiny_chat), multiplier=5)
    with pytest.raises(ValueError, match="no vector of layer 2: the layers are 1, 3"):
        cl.explore(tiny_chat, random_vectors(tiny_chat, layers=[1, 3]), layer=2)


CELLS = (
    """
import sys, torch
from pathlib import Path
sys.path[:0] = {paths}
torch.set_num_threads(1)
import caa_lens as cl
from helpers.models import tiny_model, random_vectors
from caa_lens.models.loading.tokenizers import folder_tokenizer
tokenizer = folder_tokenizer(Path({folder!r}))
model = tiny_model(d_vocab=len(tokenizer), n_ctx=512, tokenizer=tokenizer)
explorer = cl.explore(model, random_vectors(model, layers=[1, 2]), max_new_tokens=200)
explorer
""",
    "explorer.stop_button.model_id, explorer.write_button.model_id",
    "print(repr(explorer.html_of('steered')[-60:]), explorer.html_of('steered').count('<span'), explorer.messages)",
)


def test_in_a_real_kernel_a_click_stops_a_text_in_its_middle(tmp_path):
    """The clicks are messages of a front end's, which the kernel takes between two tokens."""
    manager = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client, of the extra notebooks")
    from helpers.models import ROOT

    first = CELLS[0].format(paths=[str(ROOT), str(ROOT / "tests")], folder=str(demo_folder()))
    kernel, client = manager.start_new_kernel(kernel_name="python3", extra_arguments=["--log-level=ERROR"])
    try:
        outputs = run(client, first)
        assert any("widget-view" in kind for one in outputs for kind in one.get("data", {}))
        (named,) = run(client, CELLS[1])
        stop, write = re.findall(r"'(\w+)'", named["data"]["text/plain"])
        click(client, write)
        seen = 0
        while seen < 5:  # what the kernel tells of the steered text, as it grows
            message = client.get_iopub_msg(timeout=60)
            seen += message["msg_type"] == "comm_msg" and "Steered" in str(message["content"])
        click(client, stop)
        end, n = "", 200
        while "stopped" not in end:
            (printed,) = [one for one in run(client, CELLS[2]) if "text" in one]
            end = printed["text"]
        n = int(re.search(r" (\d+) \(", end)[1])
        assert 1 <= n < 190, end
        assert end.strip().endswith("()")
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def click(client, model_id):
    content = {"comm_id": model_id, "data": {"method": "custom", "content": {"event": "click"}}}
    client.shell_channel.send(client.session.msg("comm_msg", content))


def run(client, code):
    """The outputs of a cell."""
    outputs = []
    answer = client.execute_interactive(
        code, timeout=120, output_hook=lambda message: outputs.append(message["content"])
    )
    assert answer["content"]["status"] == "ok", answer["content"]
    return [one for one in outputs if "data" in one or "text" in one]
