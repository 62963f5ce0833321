"""Loading: Hugging Face's numbers from every source, and clear refusals of everything else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.models import SHARED, edited, random_llama
from helpers.templates import LLAMA2_TEMPLATE

from caa_lens.models.loading import load as models
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.load import ModelTooLargeError, load_model, n_parameters

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

    from caa_lens.models.loading.demo_model import demo_model_path

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
        (
            {"model_type": "mistral"},
            "model_type='mistral', expected 'llama': only models of the Llama architecture become",
        ),
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
        load_model(edited(folder, tmp_path, **entries), device="cpu", backend="hooked")


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
    client = _hub_client()
    return client.Response(status, request=client.Request("GET", "https://hub"))


def _hub_client():
    """The HTTP client that huggingface_hub itself imports, whose errors it lets through."""
    from huggingface_hub import file_download

    return getattr(file_download, "httpx2", None) or file_download.httpx


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

    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    name, _, status = problem.partition(" ")
    text = "401 Client Error, headers: {'authorization': 'Bearer hf_secret'}"
    if status:
        error = getattr(errors, name)(text, response=_response(int(status)))
    else:
        error = (getattr(errors, name, None) or _hub_client().ConnectTimeout)(text)

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
    assert (cfg.model_name, cfg.tokenizer_name) == ("SmolLM2-135M-Instruct-4bit", "SmolLM2-135M-Instruct-4bit")
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
    code = "import sys, caa_lens.models.loading.load; print({'transformer_lens', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the prompt format follows from the checkpoint --------------------------------------------------------------

CHAT_ID = "meta-llama/Llama-2-7b-chat-hf"
FOLDERS = ["Llama-2-7b-chat-hf", "Llama-2-7b-hf", "0f1e2d3c"]
QUESTION = "  [INST] What's  this? </s> \n日本\n\n\n   (A) don't"


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory):
    """A random Llama with Meta's bare tokenizer.model, and nothing that says which Llama it is."""
    file = SHARED / "llama2_tokenizer" / "tokenizer.model"
    if not file.exists():
        pytest.skip("needs ../shared/llama2_tokenizer/tokenizer.model beside the project")
    folder = tmp_path_factory.mktemp("bare")
    random_llama(folder, vocab_size=32000)
    shutil.copy(file, folder)
    return folder


def copied(folder, to, *, known_as=None, template=None):
    shutil.copytree(folder, to)
    if known_as:
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"_name_or_path": known_as}))
    if template:
        (to / "chat_template.jinja").write_text(template)
    return to


def format_and_ids(folder):
    from caa_lens.prompts.prompt_formats import default_format

    model = load_model(folder, device="cpu")
    chosen = default_format(model)
    return (
        chosen.name,
        model.tokenizer(QUESTION)["input_ids"],
        chosen.encode(model.tokenizer, QUESTION, warn=False).tokens,
    )


@pytest.mark.parametrize(
    ("expected", "known_as", "template"),
    [
        ("llama2-chat", CHAT_ID, None),
        ("llama2-chat", "meta-llama/Llama-2-13b-chat-hf", None),
        ("llama2-base", "meta-llama/Llama-2-7b-hf", None),
        ("llama2-chat", None, LLAMA2_TEMPLATE),
        ("llama2-chat", "meta-llama/Llama-2-7b-hf", LLAMA2_TEMPLATE),
        ("chat-template", CHAT_ID, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"),
    ],
)
def test_the_same_files_have_the_same_format_and_ids_under_every_name(
    expected, known_as, template, llama2_folder, tmp_path
):
    found = set()
    places = [*FOLDERS, "models--meta-llama--Llama-2-7b-hf/snapshots/0f1e"]
    for name in places:
        to = copied(llama2_folder, tmp_path / name, known_as=known_as, template=template)
        found.add(tuple(map(str, format_and_ids(to))))
        shutil.rmtree(to)
    assert len(found) == 1
    assert found.pop()[0] == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_where_nothing_says_what_it_is_the_base_format_is_chosen_and_told(name, llama2_folder, tmp_path):
    from caa_lens.prompts.users_words import GuessedFormatWarning

    with pytest.warns(GuessedFormatWarning, match=rf"'{name}' is prompted.*'llama2-base' was chosen"):
        chosen, ids, _ = format_and_ids(copied(llama2_folder, tmp_path / name))
    assert chosen == "llama2-base"
    assert ids[:4] == [1, 259, 518, 25580]


@pytest.mark.parametrize(("name", "expected"), [(CHAT_ID, "llama2-chat"), ("meta-llama/Llama-2-13b-hf", "llama2-base")])
def test_a_snapshot_in_a_hub_cache_is_known_by_its_hub_id(name, expected, llama2_folder, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = (
        tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "f5db02db724555f92da89c216ac04704f23d4590"
    )
    copied(llama2_folder, snapshot)
    model = load_model(snapshot, device="cpu")
    assert model.cfg.model_name == model.cfg.tokenizer_name == name
    assert format_and_ids(snapshot)[0] == expected
    link = tmp_path / "my-llama"
    link.symlink_to(snapshot)
    assert load_model(link, device="cpu").cfg.model_name == name
    # By its id, the same files give the same.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert format_and_ids(name) == format_and_ids(snapshot)


@pytest.mark.parametrize(
    "place", ["models--onlyname/snapshots/1", "models--a--b/refs/1", "snapshots/1", "a--b/snapshots/1"]
)
def test_what_only_looks_like_a_hub_cache_is_a_folder(place, folder, tmp_path):
    assert load_model(copied(folder, tmp_path / place), device="cpu").cfg.model_name == "1"


@pytest.mark.parametrize(
    "kind", ["bare", "bare in a cache", "bare and known", "with configuration", "saved", "template"]
)
def test_a_finetuned_copy_keeps_the_tokenizers_ids_and_the_format(kind, llama2_folder, tmp_path):
    from caa_lens.models.loading.tokenizers import copy_tokenizer, folder_tokenizer

    place = "models--meta-llama--Llama-2-7b-chat-hf/snapshots/f5db" if kind == "bare in a cache" else "original"
    known_as = CHAT_ID if kind in ("bare and known", "with configuration", "saved") else None
    original = copied(
        llama2_folder,
        tmp_path / place,
        known_as=known_as,
        template=LLAMA2_TEMPLATE if kind in ("bare", "template") else None,
    )
    if kind == "with configuration":
        (original / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False})
        )
    if kind == "saved":
        folder_tokenizer(original).save_pretrained(original)
    copy = tmp_path / "scratch"
    random_llama(copy, vocab_size=32000, seed=1)  # other weights
    (copy / "tokenizer.json").write_text("{}")  # what transformers may have left there
    copy_tokenizer(original, copy)
    assert format_and_ids(copy) == format_and_ids(original)
    assert format_and_ids(copy)[0] == "llama2-chat"


def test_a_tokenizers_files_give_their_own_ids_whatever_transformers_makes_of_them(llama2_folder, tmp_path):
    """Without this, 'AutoTokenizer' forgets blanks: ' Hello' and 'Hello' would be the same tokens."""
    import random

    from caa_lens.models.loading.tokenizers import folder_tokenizer

    bare = folder_tokenizer(llama2_folder)
    bare.save_pretrained(tmp_path / "saved")
    copied(llama2_folder, tmp_path / "configured")
    (tmp_path / "configured" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    generator = random.Random(0)
    parts = ["a", " ", "  ", "\n", "</s>", "é", "日", "😀", "(A)", "12", "[INST]", "\u200b", "\t", "<s>"]
    texts = ["".join(generator.choices(parts, k=generator.randrange(12))) for _ in range(300)]
    for name in ("saved", "configured"):
        again = folder_tokenizer(tmp_path / name)
        for text in texts:
            assert again(text)["input_ids"] == bare(text)["input_ids"], (name, text)
            assert again.decode(again(text)["input_ids"]) == bare.decode(bare(text)["input_ids"]), (name, text)
