"""Weights: read from safetensors and GGUF, laid out so that the forward pass does not copy them."""

import json
import subprocess
import sys

import einops
import pytest
import torch
from helpers.models import edited, random_llama, tiny_model, write_gguf
from safetensors.torch import load_file

from caa_lens.models.loading.checkpoints import SafetensorsFolder
from caa_lens.models.loading.llama_config import hooked_config
from caa_lens.models.loading.load import load_model
from caa_lens.models.loading.weights import expected_shapes, lay_out_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


def forward_copies(model):
    """Names of the weights that TransformerLens' forward pass would copy."""
    heads_in, heads_out = "n m h -> (n h) m", "n h m -> m (n h)"
    conversions = {
        "attn.W_Q": lambda w: einops.rearrange(w, heads_in),
        "attn.W_K": lambda w: einops.rearrange(w, heads_in),
        "attn._W_K": lambda w: einops.rearrange(w, heads_in),
        "attn.W_V": lambda w: einops.rearrange(w, heads_in),
        "attn._W_V": lambda w: einops.rearrange(w, heads_in),
        "attn.W_O": lambda w: einops.rearrange(w, heads_out).contiguous(),
        "mlp.W_in": lambda w: w.T.contiguous(),
        "mlp.W_gate": lambda w: w.T.contiguous(),
        "mlp.W_out": lambda w: w.T.contiguous(),
        "unembed.W_U": lambda w: w.T.contiguous(),
    }
    weights = [
        (name, parameter, convert)
        for name, parameter in model.named_parameters()
        for end, convert in conversions.items()
        if name.endswith(end)
    ]
    assert len(weights) == 7 * model.cfg.n_layers + 1
    return [name for name, parameter, convert in weights if convert(parameter).data_ptr() != parameter.data_ptr()]


@pytest.mark.parametrize("n_key_value_heads", [2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_pass_of_a_loaded_model_copies_no_weight(tmp_path, n_key_value_heads, tied):
    random_llama(tmp_path, num_key_value_heads=n_key_value_heads, tie_word_embeddings=tied)
    model = load_model(tmp_path, device="cpu")
    assert forward_copies(model) == []
    shared = model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr()
    assert shared == tied


def test_parameters_train_and_buffers_are_shared(folder):
    with torch.inference_mode():
        model = load_model(folder, device="cpu")
    assert all(p.requires_grad and not p.is_inference() and not p.is_meta for p in model.parameters())
    assert not any(buffer.is_meta or buffer.is_inference() for buffer in model.buffers())
    assert len({block.attn.rotary_sin.data_ptr() for block in model.blocks}) == 1
    model(torch.tensor([[1, 5, 7]]), return_type="loss").backward()
    assert not model.training


def test_rotary_table_grows_with_the_prompt(tmp_path):
    hf = random_llama(tmp_path, max_position_embeddings=3000)
    model = load_model(tmp_path, device="cpu")
    tokens = torch.randint(3, 64, (1, 2100))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, -5:], hf(tokens).logits[:, -5:], atol=2e-3, rtol=0)


@pytest.mark.parametrize("n_key_value_heads", [2, None])
def test_laying_out_changes_strides_and_nothing_else(n_key_value_heads):
    model = tiny_model(n_key_value_heads=n_key_value_heads)
    tokens = torch.randint(0, 64, (2, 9))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert len(forward_copies(model)) > 0
    with torch.no_grad():
        logits = model(tokens)
        assert lay_out_weights(model) is model
        assert torch.equal(model(tokens), logits)
    assert forward_copies(model) == []
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    kept = [parameter.data_ptr() for parameter in model.parameters()]
    lay_out_weights(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == kept


def test_laying_out_leaves_an_mlp_without_gate_alone():
    import warnings

    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=16, d_head=8, n_ctx=8, d_vocab=11, act_fn="gelu", device="cpu", seed=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(cfg)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(lay_out_weights(model)(tokens), logits)
    assert model.blocks[0].mlp.W_in.is_contiguous()


def test_shards_and_one_file_give_the_same_tensors(tmp_path, folder):
    random_llama(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = SafetensorsFolder(folder), SafetensorsFolder(tmp_path)
    assert one.shapes == many.shapes
    assert one.shapes == expected_shapes(hooked_config(json.loads((folder / "config.json").read_text())))
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.shapes)


def test_missing_shard_is_named(tmp_path):
    random_llama(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {shard.name}, which .*index.json lists: download the"):
        load_model(tmp_path, device="cpu")


def test_damaged_index_is_named(tmp_path, folder):
    random_llama(tmp_path, shard="20KB")
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"says that {other} holds 'model.norm.weight', but it does not"):
        SafetensorsFolder(tmp_path)
    index_file.write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged: download it again"):
        SafetensorsFolder(tmp_path)


def test_truncated_file_is_named(tmp_path, folder):
    edited(folder, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or was not downloaded to its end"):
        load_model(tmp_path, device="cpu")


def test_folder_with_only_pickled_weights_is_refused(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\['pytorch_model.bin'\], expected model.safetensors .*convert with"):
        load_model(tmp_path, device="cpu")


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path, folder):
    whole = load_file(folder / "model.safetensors")
    gate = "model.layers.1.mlp.gate_proj.weight"
    missing = {name: tensor for name, tensor in whole.items() if name != gate}
    with pytest.raises(ValueError, match=rf"missing '{gate}'; unexpected none"):
        load_model(edited(folder, tmp_path, tensors=missing), device="cpu")
    extra = whole | {"model.layers.9.mlp.gate_proj.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"missing none; unexpected 'model.layers.9.mlp.gate_proj.weight'"):
        load_model(edited(folder, tmp_path, tensors=extra), device="cpu")
    misshapen = whole | {gate: torch.zeros(48, 31)}
    with pytest.raises(ValueError, match=rf"'{gate}' has shape \[48, 31\], but config.json asks for \[48, 32\]"):
        load_model(edited(folder, tmp_path, tensors=misshapen), device="cpu")
    quantised = whole | {gate: torch.zeros(48, 32, dtype=torch.int8)}
    with pytest.raises(ValueError, match=rf"'{gate}' is stored as I8, expected one of BF16, F16, F32, F64"):
        load_model(edited(folder, tmp_path, tensors=quantised), device="cpu")


def test_rotary_frequencies_in_a_checkpoint_are_passed_over(tmp_path, folder):
    old = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    load_model(edited(folder, tmp_path, tensors=old), device="cpu")


def test_stored_unembedding_of_tied_embeddings_must_be_the_embedding(tmp_path, folder):
    whole = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight: set tie_word"):
        load_model(edited(folder, tmp_path, tie_word_embeddings=True), device="cpu")
    same = whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()}
    load_model(edited(folder, tmp_path, tensors=same, tie_word_embeddings=True), device="cpu")


PEAK = """
import sys, torch
from caa_lens.models import load_model
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
first, *jobs = sys.argv[1:]
load_model(first, device="cpu")  # so that imports are done
models = []  # kept, for memory that one leaves would be used again by the next, and not be seen
for folder, dtype in zip(jobs[::2], jobs[1::2]):
    open("/proc/self/clear_refs", "w").write("5")  # start the high-water mark anew
    before = status("VmRSS")
    model = load_model(folder, dtype=dtype, device="cpu")
    print((status("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
    models.append(model)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_loading_takes_little_more_than_the_weights(tmp_path, folder):
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4000}
    jobs = []
    for stored, dtype, shard in [
        (torch.float16, "float32", "5GB"),
        (torch.float32, "bfloat16", "30MB"),
        (torch.bfloat16, "bfloat16", "5GB"),
    ]:
        source = tmp_path / str(stored)
        random_llama(source, dtype=stored, shard=shard, num_attention_heads=12, **size)
        jobs += [str(source), dtype]
    command = [sys.executable, "-c", PEAK, str(folder), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 3
    assert all(0.9 < peak <= 1.3 for peak in peaks), peaks


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A random Llama with Llama 3's rotary scaling, and the factors that llama.cpp stores for it."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    hf = random_llama(tmp_path_factory.mktemp("llama3"), head_dim=64, rope_parameters=rope)
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    return hf, plain / hf.model.rotary_emb.inv_freq


def test_gguf_gives_the_logits_of_the_model_it_was_written_from(tmp_path, llama3):
    tokens = torch.randint(3, 64, (2, 30), generator=torch.Generator().manual_seed(0))
    plain = random_llama(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    for hf, factors in [(plain, None), llama3]:
        model = load_model(write_gguf(tmp_path / "tiny-F32.gguf", hf, rope_factors=factors), device="cpu")
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-3, rtol=0)
        assert forward_copies(model) == []
        assert (model.cfg.model_name, model.tokenizer) == ("tiny-F32", None)


def test_gguf_that_transformers_would_misread_is_refused(tmp_path, llama3):
    from gguf import RopeScalingType

    hf, factors = llama3
    path = tmp_path / "tiny.gguf"
    with pytest.raises(ValueError, match="rotary factors that are not those of Llama 3: load the safetensors"):
        load_model(write_gguf(path, hf, rope_factors=factors**2), device="cpu")
    with pytest.raises(ValueError, match="rotary scaling 'linear', expected none or Llama 3's"):
        load_model(write_gguf(path, hf, scaling=RopeScalingType.LINEAR), device="cpu")
    with pytest.raises(ValueError, match=r"missing 'blk.1.ffn_up.weight'; unexpected none: mixtures of experts"):
        load_model(write_gguf(path, hf, drop=["model.layers.1.mlp.up_proj.weight"]), device="cpu")
    with pytest.raises(ValueError, match="holds a 'qwen2', expected 'llama'"):
        load_model(write_gguf(path, hf, architecture="qwen2"), device="cpu")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"tiny.gguf is damaged or was not downloaded to its end"):
        load_model(path, device="cpu")
