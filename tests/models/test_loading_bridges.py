"""Loading as a TransformerBridge: transformers' numbers and token ids, whatever the family, and clear refusals."""

import hashlib
import json

import pytest
import torch
from helpers.models import edited, known_as, random_llama, write_gguf
from safetensors.torch import load_file, save_file

from caa_lens.models import comparison
from caa_lens.models.loading import bridges
from caa_lens.models.loading import load as models
from caa_lens.models.loading.causal_models import has_hooked_transformer
from caa_lens.models.loading.load import ModelTooLargeError, load_model, n_parameters

pytestmark = pytest.mark.bridge

D_VOCAB = 320
TOKENS = {"vocab_size": D_VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 64}
GROUPED = SHAPE | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED | {"attention_bias": True},  # which no HookedTransformer has
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "mistral": GROUPED | {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": SHAPE,
    "phi": SHAPE,
    "olmo2": GROUPED,
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
    },  # no attention
}
TEXTS = ["hello", " hello  there", "", "The rain\n\nstopped, 12 (A) é 日本"]


def random_model(folder, family="qwen2", *, dtype=torch.float32, seed=0, **options):
    """Save a random model of transformers whose layers do something, and return it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(TOKENS | FAMILIES[family] | options))
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in hf.named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 5
        elif "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    hf.to(dtype).save_pretrained(folder)
    return hf


def save_tokenizer(folder, *, bos):
    """A small byte-level tokenizer, which puts a BOS in front of a text or does not."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=D_VOCAB, special_tokens=["<u>", "<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([*TEXTS, "hello there hello"] * 4, trainer)
    assert backend.get_vocab_size() <= D_VOCAB
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", **{"bos_token": "<s>"} if bos else {}
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def contents(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


own_comparison = comparison.check_against


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """What the library was asked to compare with the untouched module; it is compared in the slow, obvious way, too."""
    asked, own = [], comparison.check_against

    def check_against(model, tokens, logp):
        with torch.no_grad():
            got = model(tokens)[0].float().log_softmax(-1).cpu()
        asked.append((model, tokens, logp))
        assert (got - logp).abs().max() <= (1e-4 if model.cfg.dtype == torch.float32 else 0.1)
        return own(model, tokens, logp)

    monkeypatch.setattr(comparison, "check_against", check_against)
    return asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen2 with a tokenizer that has no BOS."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen"
    random_model(folder)
    save_tokenizer(folder, bos=False)
    return folder


def untouched(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def batch(n=40):
    return torch.randint(3, D_VOCAB, (2, n), generator=torch.Generator().manual_seed(1))


# ---- numbers and ids ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_token_ids_are_those_of_transformers(family, tmp_path, compared):
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path / f"tiny-{family}"
    random_model(folder, family)
    native = save_tokenizer(folder, bos=family in ("llama", "gemma2", "mistral"))
    before = contents(folder)
    model = load_model(folder, device="cpu")
    hf = untouched(folder)
    assert isinstance(model, TransformerBridge)
    with torch.no_grad():
        expected = hf(batch(), output_hidden_states=True)
        logits, cache = model.run_with_cache(batch())
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    # Of a state-space model transformers gives no hidden state before the first block.
    after, name = (0, "hook_out") if family == "mamba2" else (1, "hook_resid_post")
    torch.testing.assert_close(cache[f"blocks.0.{name}"], expected.hidden_states[after], atol=1e-5, rtol=1e-5)
    assert expected.logits.std() > 0.05  # else anything would agree
    for text in TEXTS:
        ids = native(text)["input_ids"]
        assert model.tokenizer(text)["input_ids"] == ids
        assert model.to_tokens(text)[0].tolist() == ids
    cfg = model.cfg
    assert (cfg.model_name, cfg.tokenizer_name, cfg.dtype, cfg.device) == (
        folder.name,
        folder.name,
        torch.float32,
        "cpu",
    )
    assert (cfg.n_layers, cfg.d_vocab, model.tokenizer.padding_side) == (3, D_VOCAB, "right")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert contents(folder) == before
    assert n_parameters(json.loads((folder / "config.json").read_text())) == sum(p.numel() for p in hf.parameters())
    (asked,) = compared
    assert asked[0] is model


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_the_configuration_says_the_type_that_the_weights_have(tmp_path, stored, dtype, expected):
    random_model(tmp_path, dtype=stored)
    model = load_model(tmp_path, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {model.cfg.dtype} == {expected}
    assert model.W_E.dtype == expected
    hf = untouched(tmp_path, dtype=expected)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), hf(batch()).logits, atol=0.02, rtol=0.02)


def test_both_backends_have_the_same_numbers_and_prompts_on_the_demo_model():
    """With TransformerLens 4 there is one backend, and transformers is what it is compared with."""
    from transformers import AutoTokenizer

    from caa_lens.models.loading.demo_model import demo_model_path
    from caa_lens.prompts.prompt_formats import default_format

    bridge, native = (
        load_model("demo", device="cpu", backend="bridge"),
        AutoTokenizer.from_pretrained(demo_model_path()),
    )
    assert {bridge.cfg.model_name, bridge.cfg.tokenizer_name} == {"SmolLM2-135M-Instruct-4bit"}
    questions = ["What is the capital of France?", "  two  blanks\n12 é"]
    assert [bridge.tokenizer(text)["input_ids"] for text in questions] == native(questions)["input_ids"]
    chosen = default_format(bridge)
    prompts = [chosen.encode(bridge.tokenizer, text, " An answer.") for text in questions]
    tokens = torch.tensor([prompts[0].tokens])
    with torch.no_grad():
        got = bridge(tokens).log_softmax(-1)
    if has_hooked_transformer():
        hooked = load_model("demo", device="cpu")
        assert type(hooked).__name__ == "HookedTransformer"
        assert default_format(hooked).name == chosen.name == "chat-template"
        assert [chosen.encode(hooked.tokenizer, text, " An answer.") for text in questions] == prompts
        for text in questions:
            assert hooked.to_tokens(text).tolist() == bridge.to_tokens(text).tolist()
        with torch.no_grad():
            torch.testing.assert_close(got, hooked(tokens).log_softmax(-1), atol=2e-4, rtol=0)
    with torch.no_grad():
        expected = untouched(demo_model_path(), dtype=torch.float32)(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_gguf_file_has_the_numbers_of_the_model_it_was_written_from(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = random_llama(tmp_path / "scaled", head_dim=64, rope_parameters=rope)
    factors = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64) / scaled.model.rotary_emb.inv_freq
    tied = random_llama(tmp_path / "tied", tie_word_embeddings=True)
    tokens = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    for hf, rope_factors in [(scaled, factors), (tied, None)]:
        drop = ["lm_head.weight"] if hf is tied else []
        file = write_gguf(tmp_path / "tiny.gguf", hf, rope_factors=rope_factors, drop=drop)
        model = load_model(file, device="cpu", backend="bridge")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
        assert (model.cfg.model_name, model.tokenizer) == ("tiny", None)
    with pytest.raises(ValueError, match=r"got device_map with tiny\.gguf"):
        load_model(file, device_map="auto")
    write_gguf(file, scaled, drop=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match=r"missing 'blk.1.ffn_up.weight'; unexpected none"):
        load_model(file, device="cpu", backend="bridge")


# ---- where it comes from, and where it goes ----------------------------------------------------------------------


def test_a_hub_model_is_loaded_from_its_snapshot(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision, any("safetensors" in pattern for pattern in allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("owner/tiny", device="cpu", revision="v1")
    assert (model.cfg.model_name, model.cfg.tokenizer_name) == ("owner/tiny", "owner/tiny")
    assert asked == [("owner/tiny", "v1", False), ("owner/tiny", "v1", True)]


def test_a_hub_model_that_cannot_be_taken_is_refused_before_its_weights_are_downloaded(folder, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, *, revision, allow_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(edited(folder, tmp_path, model_type="ctrl"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="has no adapter for a CTRLLMHeadModel"):
        load_model("owner/tiny", device="cpu")


def test_a_copy_of_a_checkpoint_is_known_by_the_hub_id_that_it_has(folder, tmp_path):
    edited(folder, tmp_path)
    save_tokenizer(tmp_path, bos=False)
    known_as(tmp_path, "owner/known")
    model = load_model(tmp_path, device="cpu")
    assert (model.cfg.model_name, model.cfg.tokenizer_name) == (tmp_path.name, "owner/known")


def test_a_folders_old_spelling_of_a_hub_id_is_only_a_name(tmp_path, caplog):
    """TransformerLens takes "gpt2-small" for an old name, and warns of it."""
    random_model(tmp_path / "gpt2-small", "gpt2")
    assert load_model(tmp_path / "gpt2-small", device="cpu").cfg.model_name == "gpt2-small"
    assert "DEPRECATED" not in caplog.text


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(folder, tmp_path, monkeypatch):
    import huggingface_hub

    config = json.loads((folder / "config.json").read_text())
    n_bytes = 4 * n_parameters(config)
    monkeypatch.setattr(bridges, "read_folder", lambda *_, **__: pytest.fail("read the weights"))
    monkeypatch.setattr(models, "free_memory", lambda device: int(n_bytes * 1.09))
    with pytest.raises(ModelTooLargeError, match=r"'tiny-qwen' has .* as float32 .*dtype='bfloat16' or 'float16'"):
        load_model(folder, device="cpu")

    def snapshot_download(repo, *, revision, allow_patterns):
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelTooLargeError, match="'owner/tiny' has"):
        load_model("owner/tiny", device="cpu")
    # What is quantised is as large as its files.
    monkeypatch.setattr(models, "free_memory", lambda device: (folder / "model.safetensors").stat().st_size)
    edited(folder, tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ModelTooLargeError, match=r"as quantised .*free: choose a smaller model"):
        load_model(tmp_path, device="cpu")


def test_a_folder_without_tokenizer_gives_a_model_without_one(tmp_path):
    from caa_lens.prompts.prompt_formats import Prompt

    hf = random_model(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert (model.tokenizer, model.cfg.tokenizer_name, model.cfg.d_vocab) == (None, None, D_VOCAB)
    tokens = torch.tensor([Prompt.from_tokens([5, 9, 33, 2], start=2).tokens])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-5, rtol=0)


def test_a_tokenizer_that_is_given_is_used_as_it_is_and_not_changed(folder, tmp_path):
    tokenizer = save_tokenizer(tmp_path, bos=True)
    tokenizer.padding_side = "left"
    before = (tokenizer("hello")["input_ids"], tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    given = load_model(folder, device="cpu", tokenizer=tokenizer)
    assert (
        given.tokenizer("hello")["input_ids"] == before[0] == [1, *load_model(folder).tokenizer("hello")["input_ids"]]
    )
    assert given.to_tokens("hello")[0].tolist() == before[0]
    assert given.tokenizer.padding_side == "right"  # on the left TransformerLens would guess a mask
    assert (tokenizer("hello")["input_ids"], tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before


def test_a_tokenizer_model_alone_is_not_read_as_that_of_another_family(folder, tmp_path):
    edited(folder, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"tokenizer.model alone, .* Llama and Mistral only, and this is a 'qwen2'"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_places_the_model(device_map, folder):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("the numbers below are the CPU's")
    model = load_model(folder, device_map=device_map)
    assert (model.cfg.device, model.W_E.device.type) == ("cpu", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), untouched(folder)(batch()).logits, atol=1e-5, rtol=0)


# ---- a model that transformers has loaded ------------------------------------------------------------------------


def test_a_loaded_model_is_taken_as_it_is(folder):
    from transformers import AutoModelForCausalLM

    hf, reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), untouched(folder)
    reference.to(torch.bfloat16)
    hf.train()
    hf.config.architectures = ["LlamaForCausalLM"]  # whatever its file says, the adapter is that of its class
    model = load_model(folder, hf_model=hf)
    assert model.cfg.architecture == "Qwen2ForCausalLM"
    assert model.original_model is hf
    assert (model.cfg.dtype, model.cfg.device, model.cfg.model_name) == (torch.bfloat16, "cpu", "tiny-qwen")
    assert not hf.training
    assert hf.config._attn_implementation == "eager"
    assert model.tokenizer("hello")["input_ids"] == load_model(folder).tokenizer("hello")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), reference(batch()).logits, atol=0.05, rtol=0.05)


def test_a_loaded_model_needs_no_files_if_it_has_a_tokenizer(tmp_path):
    hf, tokenizer = random_model(tmp_path / "hf"), save_tokenizer(tmp_path / "tokenizer", bos=False)
    model = load_model("my model", hf_model=hf, tokenizer=tokenizer)
    assert (model.cfg.model_name, model.cfg.tokenizer_name) == ("my model", "my model")
    assert model.to_tokens("hello")[0].tolist() == tokenizer("hello")["input_ids"]
    hf = random_model(tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match="got 'my model' with hf_model, expected a hub id or folder to read"):
        load_model("my model", hf_model=hf)
    with pytest.raises(ConnectionError, match="hub cannot be reached"):
        load_model("owner/model", hf_model=hf)


def test_what_cannot_stand_for_a_loaded_model_is_refused(folder):
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, Qwen2Model

    hf = untouched(folder)
    for options in ({"dtype": "bf16"}, {"device": "cpu"}, {"device_map": "auto"}):
        (name,) = options
        with pytest.raises(ValueError, match=f"got {name} with hf_model, .*give {name}= to transformers"):
            load_model(folder, hf_model=hf, **options)
    with pytest.raises(ValueError, match=r"backend='hooked' with hf_model|has no HookedTransformer"):
        load_model(folder, hf_model=hf, backend="hooked")
    load_model(folder, hf_model=hf)
    with pytest.raises(ValueError, match=r"TransformerLens booted already, .*or load it anew"):
        load_model(folder, hf_model=hf)
    with pytest.raises(ValueError, match="got hf_model a Qwen2Model, expected a Qwen2ForCausalLM"):
        load_model(folder, hf_model=Qwen2Model.from_pretrained(folder))
    with pytest.raises(ValueError, match="a Qwen2ForSequenceClassification, expected a Qwen2ForCausalLM"):
        load_model(folder, hf_model=AutoModelForSequenceClassification.from_config(untouched(folder).config))
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(ValueError, match="'bert', which is an encoder"):
        load_model(folder, hf_model=BertForMaskedLM(BertConfig(vocab_size=30, hidden_size=8, **shape)))
    with pytest.raises(TypeError, match=r"got hf_model .*Linear.*, expected a model of transformers"):
        load_model(folder, hf_model=torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got tokenizer .*, expected a tokenizer of transformers"):
        load_model(folder, tokenizer="gpt2")


# ---- the check ---------------------------------------------------------------------------------------------------


def test_the_bridge_is_compared_with_the_untouched_module_and_that_is_told_once(folder, compared, capsys):
    load_model(folder, device="cpu")
    ((_, tokens, logp),) = compared
    with torch.no_grad():
        expected = untouched(folder)(tokens).logits[0].log_softmax(-1)
    torch.testing.assert_close(logp, expected, atol=1e-6, rtol=0)
    assert tokens.shape == (1, 8)
    assert len(set(tokens[0].tolist())) == 8
    assert not {1, 2} & set(tokens[0].tolist())  # BOS and padding
    shown = capsys.readouterr()
    assert shown.err.count("compared with the untouched Hugging Face module on 8 tokens") == 1
    assert shown.out == ""
    load_model(folder, device="cpu", check=False)
    assert len(compared) == 1
    assert "the bridge has" not in capsys.readouterr().err


def test_the_comparison_is_without_dropout_and_without_padding(tmp_path, compared):
    """Else the untouched model's numbers would be other ones each time, or those behind a padding token."""
    hf = random_model(tmp_path, "gpt2", pad_token_id=20, attn_pdrop=0.5, resid_pdrop=0.5)  # 20 would be the first
    load_model("my model", hf_model=hf.train(), tokenizer=save_tokenizer(tmp_path, bos=False))
    ((_, tokens, logp),) = compared
    assert tokens[0].tolist() == [21, 60, 100, 140, 180, 220, 260, 300]
    with torch.no_grad():
        torch.testing.assert_close(logp, untouched(tmp_path)(tokens).logits[0].log_softmax(-1), atol=1e-5, rtol=0)


def test_an_adapter_that_computes_something_else_is_refused(folder, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers

    def other(*given, **options):
        bridge = boot(*given, **options)
        bridge.original_model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
        return bridge

    monkeypatch.setattr(TransformerBridge, "boot_transformers", other)
    monkeypatch.setattr(comparison, "check_against", own_comparison)
    with pytest.raises(ValueError, match="does not give the numbers of its own Hugging Face module"):
        load_model(folder, device="cpu")
    load_model(folder, device="cpu", check=False)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "bert"}, "'bert', which is an encoder, .*expected a causal language model: take a decoder"),
        ({"model_type": "roberta"}, "'roberta', which is an encoder"),
        ({"model_type": "t5"}, "'t5', which is an encoder-decoder"),
        ({"model_type": "bart"}, "'bart', which is an encoder-decoder"),
        ({"model_type": "clip"}, "'clip', which is nothing that transformers' AutoModelForCausalLM loads"),
        (
            {"model_type": "gemma3"},
            r"'gemma3' \(Gemma3ForConditionalGeneration\), which takes pictures .*boot it yourself",
        ),
        ({"model_type": "ctrl"}, r"TransformerLens [\d.]+ has no adapter for a CTRLLMHeadModel .*expected one of"),
        ({"model_type": "nonsense"}, r"'nonsense', which transformers [\d.]+ does not know, .*a newer transformers"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}},
            "code of its own, .*trust_remote_code=True, .*hf_mo",
        ),
        ({"hidden_size": "wide"}, "config.json is not the configuration of a complete 'qwen2' .*hidden_size"),
        ({"rope_parameters": {"rope_type": "linear"}}, "complete 'qwen2' .*factor"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_before_its_weights_are_read(
    entries, message, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(bridges, "read_folder", lambda *_, **__: pytest.fail("read the weights"))
    tensors = {"weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_model(edited(folder, tmp_path, tensors=tensors, **entries), device="cpu")


def test_weights_that_transformers_would_fill_with_noise_are_refused(folder, tmp_path):
    whole = load_file(folder / "model.safetensors")
    gate = "model.layers.1.mlp.gate_proj.weight"

    def put(tensors):
        edited(folder, tmp_path, tensors={})
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    with pytest.raises(ValueError, match=rf"does not hold the tensors .*: missing '{gate}'; of another shape none"):
        load_model(put({name: tensor for name, tensor in whole.items() if name != gate}), device="cpu")
    with pytest.raises(ValueError, match=r"tensors whose shapes are not those that its config.json asks for"):
        load_model(put(whole | {gate: torch.zeros(48, 31)}), device="cpu")
    with pytest.raises(ValueError, match=r"'model.norm.weight' is stored as I8, expected one of"):
        load_model(put(whole | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), device="cpu")
    file = put(whole) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or was not downloaded to its end"):
        load_model(tmp_path, device="cpu")
    file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\['pytorch_model.bin'\], expected model.safetensors"):
        load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_model(tmp_path, device="cpu")


def test_arguments_that_exclude_each_other_are_refused_before_anything_is_read():
    for options, message in [
        ({"backend": "nnsight"}, "got backend='nnsight', expected 'hooked', 'bridge', or None"),
        ({"device": "cpu", "device_map": "auto"}, "got device='cpu' and device_map='auto', expected one of them"),
        ({"dtype": "float8"}, "expected a torch.dtype or name among"),
        ({"device": "cuda:77"}, "but this machine has"),
        ({"backend": "hooked", "device_map": "auto"}, "'hooked' with device_map, which takes a 'bridge'|has no Hooked"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model("nowhere", **options)


def test_a_hooked_transformer_is_made_of_what_it_computes_only(folder, tmp_path):
    random_llama(tmp_path / "llama")
    if has_hooked_transformer():
        with pytest.raises(ValueError, match=r"model_type='qwen2', expected 'llama': .*become a HookedTransformer"):
            load_model(folder, device="cpu", backend="hooked")
        assert type(load_model(tmp_path / "llama", device="cpu")).__name__ == "HookedTransformer"
    else:
        with pytest.raises(ValueError, match=r"TransformerLens 4[\d.]+ has no HookedTransformer, .*leave backend out"):
            load_model(tmp_path / "llama", device="cpu", backend="hooked")
        assert type(load_model(tmp_path / "llama", device="cpu")).__name__ == "TransformerBridge"
    assert type(load_model(tmp_path / "llama", device_map="auto")).__name__ == "TransformerBridge"
