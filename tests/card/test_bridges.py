"""A bridge over Hugging Face's Llama on the fake card, as a model over several cards is one."""

import pytest
import torch
from helpers.card_calls import READS, completions, letters, vectors_of
from helpers.fake_gpu import SHAPES, fake_gpu

import caa_lens as cl
from caa_lens.engine import shared_prefix

pytestmark = [
    pytest.mark.bridge,
    pytest.mark.filterwarnings("ignore::caa_lens.vectors.extraction.ZeroVectorWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.contrast.sets.LetterBalanceWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.engine.shared_prefix.SharedPrefixWarning"),
]
# The parts of a bridge are those of its module, and no token knows of those behind it.
READS = {**READS, "_check_one_way": False, "_compare": False}


def bridge_on_cards(shape, n_layers, tokenizer, dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    from caa_lens.models.loading.bridges import boot

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=max(32000, len(tokenizer)),
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_mlp"],
        num_hidden_layers=n_layers,
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes.get("n_kv_heads", sizes["n_heads"]),
        max_position_embeddings=4096,
        attn_implementation="eager",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        hf = LlamaForCausalLM(config)
    hf.to(dtype).to_empty(device="cuda:0")
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config=config).to("cuda:0")
    return boot(hf, "shape-of-llama-2", tokenizer, "", check=False)


@pytest.fixture(scope="module")
def model(demo_tokenizer):
    with fake_gpu(**READS):
        return bridge_on_cards("70B", 4, demo_tokenizer)


CALLS = {
    "extract": lambda m, n: cl.extract(m, letters(8 * n), progress=False),
    "sweep": lambda m, n: cl.sweep(m, letters(2 * n), vectors_of(m).at([1, 3]), multipliers=[0, 1], progress=False),
    "sweep completions": lambda m, n: cl.sweep(
        m, completions(n), vectors_of(m).at([1]), multipliers=[0, 1], progress=False
    ),
    "generate": lambda m, n: cl.generate(m, ["Hello", "How are you?"], [vectors_of(m)[1]], max_new_tokens=2 * n),
}


def counted(call, model, n):
    with fake_gpu(**READS) as gpu:
        call(model, n)
    return gpu.waits, gpu.uploads


@pytest.mark.parametrize("name", CALLS)
def test_a_bridge_runs_on_a_card(model, name):
    counted(CALLS[name], model, 1)


def test_a_bridge_shares_prompts_on_a_card(model):
    with fake_gpu(**READS):
        assert shared_prefix.unsupported(model) is None


def test_a_bridge_waits_once_a_token_and_not_for_its_layers(model):
    few, more = (counted(CALLS["generate"], model, n) for n in (1, 2))
    assert more[0] - few[0] == 2
    one, two = (counted(CALLS["extract"], model, n) for n in (1, 2))
    assert two[0] - one[0] <= 1
