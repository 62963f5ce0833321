"""What a model takes that is packed or spread over devices, and that it is refused before its weights are read."""

import importlib.util
import json

import pytest
import torch
from helpers.models import edited, random_llama

from caa_lens.models.loading import bridges, spread
from caa_lens.models.loading import load as models
from caa_lens.models.loading.load import ModelTooLargeError, load_model
from caa_lens.models.loading.quantisation import quantisation_config, weight_bytes
from caa_lens.models.loading.spread import shares

pytestmark = pytest.mark.bridge

# Of Llama 2, by its published config.json.
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
MATRICES = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192)  # of the blocks
OTHERS = 2 * 32000 * 8192 + (2 * 80 + 1) * 8192  # embedding, unembedding, norms
ROWS = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    random_llama(folder, hidden_size=64, intermediate_size=128)
    return folder


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(bridges, "read_folder", lambda *_, **__: pytest.fail("read the weights"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def nested():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def everywhere():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])


@pytest.mark.parametrize("asked", ["8bit", "4bit", nested, everywhere, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_transformers_takes(folder, asked, dtype):
    from transformers import AutoModelForCausalLM

    asked = asked() if callable(asked) else asked
    hf = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation_config(asked, dtype), dtype=dtype, device_map={"": "cpu"}
    )
    found = 0
    for parameter in hf.parameters():
        found += parameter.numel() * parameter.element_size()
        if getattr(parameter, "SCB", None) is not None:
            found += 4 * parameter.SCB.numel()
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found += state.absmax.numel() * state.absmax.element_size() + 4 * state.code.numel()
            found += 4 if state.nested else 0
            state = state.state2
    assert weight_bytes(config_of(folder), dtype=dtype, quantised=asked) == found


def test_bytes_of_llama_2_70b_are_those_of_its_shape():
    assert weight_bytes(LLAMA_70B) == 2 * (MATRICES + OTHERS)
    assert weight_bytes(LLAMA_70B, quantised="8bit") == MATRICES + 4 * ROWS + 2 * OTHERS
    assert weight_bytes(LLAMA_70B, quantised="4bit") == MATRICES // 2 + 4 * MATRICES // 64 + 80 * 7 * 64 + 2 * OTHERS


def test_the_demo_model_has_the_numbers_of_tied_weights():
    from caa_lens.models.loading.demo_model import demo_model_path

    config = config_of(demo_model_path())
    assert weight_bytes(config, dtype=torch.float32) == 4 * models.n_parameters(config)


def test_a_parameter_counts_where_the_longest_name_puts_it():
    sizes = {"model.layers.1.a": 1, "model.layers.10.a": 2, "model.norm.weight": 4, "lm_head.weight": 8}
    device_map = {"": 0, "model.layers.1": "cuda:1", "model": "cpu", "lm_head": torch.device("cuda:1")}
    assert shares(sizes, device_map) == {"cuda:1": 9, "cpu": 6}
    assert shares(sizes, {"model": "disk", "lm_head": 1}) == {"cuda:1": 8}


def test_packed_weights_that_do_not_fit_are_refused_before_they_are_read(folder, unread, monkeypatch):
    needed = 1.1 * weight_bytes(config_of(folder), dtype=torch.float32, quantised="4bit")
    monkeypatch.setattr(models, "free_memory", lambda device: int(needed) - 1)
    with pytest.raises(ModelTooLargeError, match=r"'tiny' has .* as quantised .*cpu has .* choose a smaller model"):
        load_model(folder, quantised="4bit", device="cpu")
    monkeypatch.setattr(models, "free_memory", lambda device: int(needed) + 1)
    with pytest.raises(pytest.fail.Exception):
        load_model(folder, quantised="4bit", device="cpu")


def test_each_device_of_a_map_has_to_have_its_share_free(folder, unread, monkeypatch):
    """On a machine with two cards, which have room for half of the blocks, and for nothing."""
    free = {"cuda:0": 10**9, "cuda:1": 100, "cpu": 10**9}
    monkeypatch.setattr(models, "devices", lambda: {"cpu": 1, "cuda": 2, "mps": 0})
    monkeypatch.setattr(spread, "free_memory", lambda device: free[device])
    monkeypatch.setattr(spread, "make_room", lambda device, n_bytes: None)
    device_map = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": "cpu", "lm_head": 0}
    with pytest.raises(
        ModelTooLargeError, match=r"the device_map puts .* of it on cuda:1, which has 0.0 GB free: move"
    ):
        load_model(folder, device_map=device_map)
    with pytest.raises(pytest.fail.Exception):
        load_model(folder, device_map=device_map | {"model.layers": "disk"})


@pytest.mark.parametrize(("asked", "counts"), [(None, ["cuda:0", "cuda:1", "cpu"]), ("4bit", ["cuda:0", "cuda:1"])])
def test_an_automatic_map_has_all_that_there_is_and_packed_weights_the_cards(
    folder, unread, monkeypatch, asked, counts
):
    needed = 1.1 * weight_bytes(config_of(folder), dtype=torch.float32, quantised=asked)
    monkeypatch.setattr(spread, "devices", lambda: {"cpu": 1, "cuda": 2, "mps": 0})
    monkeypatch.setattr(spread, "make_room", lambda device, n_bytes: None)
    monkeypatch.setattr(spread, "free_memory", lambda device: needed / len(counts) - 1 if device in counts else 1e12)
    with pytest.raises(ModelTooLargeError, match=rf"{' and '.join(counts)} have 0.0 GB free: choose a smaller model"):
        load_model(folder, device_map="auto", quantised=asked, dtype="float32")
    monkeypatch.setattr(spread, "free_memory", lambda device: needed / len(counts) + 1 if device in counts else 0)
    with pytest.raises(pytest.fail.Exception):
        load_model(folder, device_map="auto", quantised=asked, dtype="float32")


def test_files_of_packed_weights_count_as_they_are(folder, tmp_path, unread, monkeypatch):
    packed = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edited(folder, tmp_path / "packed", quantization_config=packed)
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    monkeypatch.setattr(spread, "free_memory", lambda device: size)
    with pytest.raises(ModelTooLargeError, match="cpu have"):
        load_model(tmp_path / "packed", device_map="auto")
    with pytest.raises(ValueError, match="got quantised='4bit' for 'packed', whose weights are packed already"):
        load_model(tmp_path / "packed", quantised="4bit")


def test_a_hub_model_that_fits_nowhere_is_refused_before_its_weights_are_downloaded(folder, unread, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, *, revision, allow_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(spread, "free_memory", lambda device: 10)
    monkeypatch.setattr(models, "free_memory", lambda device: 10)
    for options in ({"device_map": "auto"}, {"quantised": "4bit"}, {"quantised": "8bit", "device_map": {"": "cpu"}}):
        with pytest.raises(ModelTooLargeError, match="'owner/tiny' has"):
            load_model("owner/tiny", **options)


# ---- what is asked for -------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(folder, unread):
    from transformers import BitsAndBytesConfig, GPTQConfig

    expected = r"expected '8bit', '4bit' or a BitsAndBytesConfig"
    for wrong, error in (("2bit", ValueError), (8, TypeError), (GPTQConfig(bits=4), TypeError)):
        with pytest.raises(error, match=expected):
            load_model(folder, quantised=wrong)
    with pytest.raises(ValueError, match="packs nothing"):
        load_model(folder, quantised=BitsAndBytesConfig())
    with pytest.raises(ValueError, match=r"'hooked' with quantised, which takes a 'bridge'|has no HookedTransformer"):
        load_model(folder, quantised="4bit", backend="hooked")
    with pytest.raises(ValueError, match=r"got device=.*'cuda:7', but this machine has"):
        load_model(folder, device_map={"model": "cpu", "lm_head": 7})


def test_what_is_not_installed_is_named_with_its_extra(folder, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else own(name))
    with pytest.raises(ImportError, match=r"quantised weights need bitsandbytes: pip install 'caa-lens\[quantised\]'"):
        load_model(folder, quantised="4bit")


def test_a_loaded_model_cannot_be_packed_any_more(folder):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match=r"got quantised with hf_model, .*give quantised= to transformers"):
        load_model(folder, hf_model=AutoModelForCausalLM.from_pretrained(folder), quantised="4bit")


def test_a_family_whose_weights_are_taken_apart_is_refused_with_what_to_do(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    for asked in ("4bit", "8bit"):
        with pytest.raises(
            ValueError, match=r"takes apart what (int8|nf4) packs in a GPT2LMHeadModel.*without quantised"
        ):
            load_model(tmp_path, quantised=asked, device="cpu")


def test_the_callers_configuration_is_not_changed(folder):
    asked = nested()
    before = asked.to_dict()
    model = load_model(folder, quantised=asked, device="cpu")
    assert asked.to_dict() == before
    assert model.cfg.model_name == "tiny (nf4)"
