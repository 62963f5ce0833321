"""Loading: Hugging Face's numbers from every source, and clear refusals of everything else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import SHARED, random_llama
from test_weights import edited

from caa_lens import models
from caa_lens.loading.llama_config import hooked_config, n_parameters
from caa_lens.models import ModelTooLargeError, load_model

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "grouped queries": {},
    "no grouped queries": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 16}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "yarn, spelled out": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "attention_factor": 1.2,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


def assert_same_numbers(model, hf, tokens, mask):
    """Log-probabilities to 1e-3, and every layer's resid_post to 1e-4 of its norm, where the mask is 1."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = hf(tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    real = mask.bool()
    got, wanted = logits[real].log_softmax(-1), expected.logits[real].log_softmax(-1)
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    # The last of Hugging Face's hidden states is normed, so the last layer is checked by the logits alone.
    for name, hidden in zip(names[:-1], expected.hidden_states[1:-1], strict=True):
        error = (cache[name][real] - hidden[real]).norm(dim=-1)
        assert (error <= 1e-4 * hidden[real].norm(dim=-1)).all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_llama_gives_the_numbers_of_hugging_face(tmp_path, variant):
    hf = random_llama(tmp_path, **VARIANTS[variant])
    model = load_model(tmp_path, device="cpu")
    tokens = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(1))
    assert_same_numbers(model, hf, tokens, torch.ones_like(tokens))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    assert_same_numbers(model, hf, tokens, mask)


def test_rope_settings_of_transformers_4_are_read(tmp_path, folder):
    hf = random_llama(tmp_path / "new", rope_parameters=VARIANTS["linear"]["rope_parameters"] | {"rope_theta": 3e4})
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(3, 63)[None]
    assert_same_numbers(load_model(tmp_path / "new", device="cpu"), hf, tokens, torch.ones_like(tokens))


def test_demo_model_gives_the_numbers_of_hugging_face(demo_model):
    from transformers import AutoModelForCausalLM

    from caa_lens.loading.demo_model import demo_model_path

    hf = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    texts = [
        "The capital of France is",
        "I was glad when the rain stopped, because I had forgotten my umbrella",
    ]
    batch = demo_model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"][0, 0] == 0
    assert_same_numbers(demo_model, hf, batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize(
    ("stored", "shard", "dtype", "expected"),
    [
        (torch.float16, "5GB", None, torch.float32),
        (torch.float16, "20KB", "fp16", torch.float16),
        (torch.float32, "20KB", "bf16", torch.bfloat16),
        (torch.float32, "5GB", torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_are_the_stored_ones_cast_once(tmp_path, stored, shard, dtype, expected):
    hf = random_llama(tmp_path, dtype=stored, shard=shard)
    model = load_model(tmp_path, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {model.cfg.dtype} == {expected}
    hf.to(expected)
    assert torch.equal(model.embed.W_E, hf.model.embed_tokens.weight)
    assert torch.equal(model.blocks[2].mlp.W_out, hf.model.layers[2].mlp.down_proj.weight.T)
    assert torch.equal(model.ln_final.w, hf.model.norm.weight)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        got, wanted = model(tokens).float().softmax(-1), hf(tokens).logits.float().softmax(-1)
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0)


def test_accelerators_take_the_type_of_the_checkpoint():
    on_gpu, on_cpu = models._Placement(None, "cuda:1"), models._Placement(None, "cpu")
    for key in ("dtype", "torch_dtype"):
        assert on_gpu.of({key: "bfloat16"}) == {"dtype": torch.bfloat16, "device": "cuda:1"}
        assert on_cpu.of({key: "bfloat16"}) == {"dtype": torch.float32, "device": "cpu"}
    assert on_gpu.of({})["dtype"] == torch.float32
    assert models._Placement(torch.float16, "cuda").of({"dtype": "float32"})["dtype"] == torch.float16


@pytest.mark.parametrize("variant", ["grouped queries", "no grouped queries", "tied", "wide heads"])
def test_parameter_count_is_the_real_one(tmp_path, variant):
    hf = random_llama(tmp_path, **VARIANTS[variant])
    config = json.loads((tmp_path / "config.json").read_text())
    assert n_parameters(config) == sum(parameter.numel() for parameter in hf.parameters())


def test_llama_2_7b_has_the_published_number_of_parameters():
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
    assert n_parameters(config | {"num_hidden_layers": 32, "num_attention_heads": 32}) == 6_738_415_616


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral', expected 'llama': only models of the Llama arch"),
        ({"attention_bias": True}, "attention_bias=True, expected False: biases in the attention"),
        ({"mlp_bias": True}, "mlp_bias=True, expected False: biases in the MLP"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config, expected plain weights: use the checkpoint",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' .*expected 'default'",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope' .*as Hugging Face does"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "'yarn' without mscale"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json has no 'factor'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor, expected none"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(folder, tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        load_model(edited(folder, tmp_path, **entries), device="cpu")


def test_incomplete_config_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    with pytest.raises(ValueError, match=r"config.json has no 'hidden_size'"):
        hooked_config(config)


def test_unreadable_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json: expected a folder with config.json and"):
        load_model(tmp_path)
    for text, message in [
        ("{", "not valid JSON: download it again"),
        ("[]", "holds a list, expected an object"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


@pytest.mark.parametrize("name", ["llama", "./nowhere", "/no/where", "a/b/c", "weights.gguf", "~/nowhere", ""])
def test_names_that_lead_nowhere_are_refused(name):
    with pytest.raises(FileNotFoundError, match=r"expected a Hugging Face id \('owner/name'\), a folder .*'demo'"):
        load_model(name)


def test_unknown_dtype_and_device_are_refused_before_anything_is_read():
    for dtype in ("float8", torch.int8, torch.float64):
        with pytest.raises(ValueError, match=r"expected a torch.dtype or name among float32, fp32"):
            load_model("nowhere", dtype=dtype)
    with pytest.raises(ValueError, match="got device='gpu', expected 'cpu', 'mps', 'cuda' or 'cuda:1'"):
        load_model("nowhere", device="gpu")
    with pytest.raises(ValueError, match="got device='cuda:77', but this machine has 1 cpu"):
        load_model("nowhere", device="cuda:77")


def test_model_that_does_not_fit_is_refused_before_its_weights_are_read(folder, monkeypatch):
    n_bytes = 4 * n_parameters(json.loads((folder / "config.json").read_text()))
    monkeypatch.setattr(models.SafetensorsFolder, "read", lambda *_, **__: pytest.fail("read a weight"))
    monkeypatch.setattr(models, "free_memory", lambda device: int(n_bytes * 1.09))
    with pytest.raises(ModelTooLargeError, match=r"billion parameters .*10 % headroom.*dtype='bfloat16' or 'float16'"):
        load_model(folder, device="cpu")
    monkeypatch.setattr(models, "free_memory", lambda device: int(n_bytes * 0.54))
    with pytest.raises(ModelTooLargeError, match=r"as bfloat16 .*free: choose a smaller model, or another device"):
        load_model(folder, device="cpu", dtype="bf16")


def test_hub_model_that_does_not_fit_is_refused_before_its_weights_are_downloaded(folder, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, *, revision, allow_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(models, "free_memory", lambda device: 1000)
    with pytest.raises(ModelTooLargeError, match="'meta-llama/Llama-2-70b-hf' has"):
        load_model("meta-llama/Llama-2-70b-hf", device="cpu")


def test_hub_model_is_loaded_from_its_snapshot(folder, monkeypatch):
    import fnmatch

    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("owner/tiny-llama", device="cpu", revision="v1")
    assert model.cfg.model_name == "owner/tiny-llama"
    assert [(repo, revision) for repo, revision, _ in asked] == [("owner/tiny-llama", "v1")] * 2
    files = [
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "README.md",
    ]
    assert [file for file in files if any(fnmatch.fnmatch(file, p) for p in asked[1][2])] == files[:1]


def _response(status):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    ("problem", "expected", "message"),
    [
        (
            "GatedRepoError 403",
            PermissionError,
            r"licence page https://huggingface.co/meta-llama/x, .*HF_TOKEN",
        ),
        (
            "HfHubHTTPError 401",
            PermissionError,
            r"licence page https://huggingface.co/meta-llama/x, .*HF_TOKEN",
        ),
        ("RepositoryNotFoundError 404", FileNotFoundError, r"neither here nor a public model .*or 'demo'"),
        ("RevisionNotFoundError 404", FileNotFoundError, r"has no revision 'v9': expected a branch"),
        (
            "LocalEntryNotFoundError",
            ConnectionError,
            r"not in the local cache, .*local folder, a .gguf file or 'demo'",
        ),
        ("OfflineModeIsEnabled", ConnectionError, r"cannot be reached: connect \(and unset HF_HUB_OFFLINE\)"),
        ("HfHubHTTPError 503", ConnectionError, r"answered 503 for 'meta-llama/x': try again later"),
        ("ConnectTimeout", ConnectionError, r"cannot be reached"),
    ],
)
def test_hub_errors_say_what_to_do_and_keep_the_token(monkeypatch, capsys, caplog, problem, expected, message):
    import traceback

    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    name, _, status = problem.partition(" ")
    text = "401 Client Error, headers: {'authorization': 'Bearer hf_secret'}"
    if status:
        error = getattr(errors, name)(text, response=_response(int(status)))
    else:
        error = (getattr(errors, name, None) or httpx.ConnectTimeout)(text)

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(expected, match=message) as caught:
        load_model("meta-llama/x", revision="v9", device="cpu")
    shown = "".join(traceback.format_exception(caught.value))
    assert "hf_secret" not in shown + caplog.text + "".join(capsys.readouterr())


def test_without_network_a_hub_id_says_so(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        load_model("caa-lens-tests/not-cached", device="cpu")


def test_tokenizer_of_the_demo_model_is_attached_as_it_is(demo_model):
    cfg, tokenizer = demo_model.cfg, demo_model.tokenizer
    assert (cfg.model_name, cfg.tokenizer_name) == ("SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct")
    assert demo_model.to_tokens("Hello").tolist() == [tokenizer("Hello")["input_ids"]] == [[19556]]
    assert (cfg.tokenizer_prepends_bos, cfg.default_prepend_bos, tokenizer.padding_side) == (
        False,
        False,
        "right",
    )
    # Digits are split off before words, so two spaces and a digit are three tokens, not "a", " ", " 1".
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_demo_model_answers(demo_model):
    tokenizer = demo_model.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = demo_model.generate(tokens, max_new_tokens=10, do_sample=False, verbose=False)
    assert "Paris" in tokenizer.decode(answer[0, tokens.shape[1] :])


def test_bare_sentencepiece_file_gives_the_ids_of_sentencepiece_and_one_bos(tmp_path):
    file = SHARED / "llama2_tokenizer" / "tokenizer.model"
    if not file.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    from sentencepiece import SentencePieceProcessor

    random_llama(tmp_path, vocab_size=32000)
    shutil.copy(file, tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert model.to_tokens("Hello").tolist() == [[1, 15043]]
    assert model.cfg.default_prepend_bos
    assert (model.tokenizer.pad_token, model.tokenizer.padding_side) == ("</s>", "right")
    pieces = SentencePieceProcessor(model_file=str(file))
    for text in [
        "[INST] Hi [/INST] Sure",
        " Hello",
        "x  y   z\t q",
        "    indent\n\n\n  k",
        "日本 é 🤗",
        "(A) don't",
        "",
    ]:
        assert model.tokenizer(text)["input_ids"] == [1, *pieces.encode(text)], text
        assert model.to_string(torch.tensor(pieces.encode(text), dtype=torch.long)) == text
    assert model.tokenizer("<s>[INST]", add_special_tokens=False)["input_ids"] == [1, 518, 25580, 29962]

    model.tokenizer.save_pretrained(tmp_path)  # now with tokenizer.json beside it
    again = load_model(tmp_path, device="cpu")
    assert again.to_tokens("Hello").tolist() == [again.tokenizer("Hello")["input_ids"]]


def test_folder_without_tokenizer_loads_without_one(folder):
    model = load_model(folder, device="cpu")
    assert model.tokenizer is None
    assert model.cfg.model_name == folder.name


def test_importing_does_not_import_the_model_libraries():
    code = "import sys, caa_lens.models; print({'transformer_lens', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
