"""The `.pt` of lm-eval's model `steered`: written and read entry by entry, and refused where it does more than add."""

from functools import partial

import pytest
import torch
from helpers.file_mutations import RunsCode
from helpers.vectors import random_set

from caa_lens.file_kinds import VectorFileError
from caa_lens.vectors.formats import lm_eval_files
from caa_lens.vectors.formats.lm_eval_files import AllPositionsWarning, is_lm_eval, read_lm_eval, write_lm_eval
from caa_lens.vectors.interchange import read_vectors, write_vectors

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

some_vectors = partial(random_set, layers=(0, 7, 20), behavior="x")


def written(vectors, path, **options):
    with pytest.warns(AllPositionsWarning):
        return write_lm_eval(vectors, path, **options)


def entries(path):
    return torch.load(path, weights_only=True)


def entry(**changes):
    return {"action": "add", "steering_vector": torch.ones(4), "steering_coefficient": 2.0} | changes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry_says_what_lm_eval_asks_for(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    found = entries(written(vectors, tmp_path / "v.pt", multiplier=-1.5))
    assert list(found) == ["layers.0", "layers.7", "layers.20"]
    for vector, one in zip(vectors, found.values(), strict=True):
        assert torch.equal(one.pop("steering_vector"), vector.direction)
        assert one == {"action": "add", "steering_coefficient": -1.5, "bias": None, "head_index": None}


def test_a_row_is_written_without_the_rest_of_the_set(tmp_path):
    big = random_set(layers=tuple(range(100)), d_model=512)
    path = written(big[3], tmp_path / "v.pth")
    assert path.stat().st_size < 10_000
    assert torch.equal(read_lm_eval(path)[3].direction, big[3].direction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_coefficient_one_writing_then_reading_is_the_identity(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    read = read_vectors(written(vectors, tmp_path / "v.pt"), model="o/m")
    assert read.layers == vectors.layers
    assert read.directions.dtype == dtype
    assert torch.equal(read.directions, vectors.directions)
    assert (read.behavior, read.provenance.model) == ("v", "o/m")
    assert read.provenance.details["source"] == "lm-eval, coefficients by layer 0: 1, 7: 1, 20: 1"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_coefficient_is_multiplied_in_without_another_rounding(tmp_path, dtype):
    vectors = some_vectors(dtype=dtype)
    read = read_vectors(written(vectors, tmp_path / "v.pt", multiplier=0.3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(read.directions, vectors.directions.to(wide) * 0.3)


def test_coefficients_that_differ_by_layer_go_to_their_own_layer(tmp_path):
    torch.save({"layers.5": entry(steering_coefficient=3), "h.2": entry(steering_coefficient=1.0)}, tmp_path / "v.pt")
    read = read_vectors(tmp_path / "v.pt")
    assert read.layers == (2, 5)
    assert torch.equal(read[2].direction, torch.ones(4))
    assert torch.equal(read[5].direction, 3 * torch.ones(4))


def test_what_may_be_left_out_is_what_lm_eval_takes_for_it(tmp_path):
    torch.save({"layers.5": {"action": "add", "steering_vector": torch.ones(4)}}, tmp_path / "v.pt")
    assert torch.equal(read_vectors(tmp_path / "v.pt")[5].direction, torch.ones(4))


@pytest.mark.parametrize(
    "name",
    ["layers.3", "model.layers.3", "base_model.model.model.layers.3", "h.3", "transformer.h.3", "gpt_neox.layers.3"],
)
def test_the_names_of_a_block_are_that_blocks_layer(tmp_path, name):
    torch.save({name: entry()}, tmp_path / "v.pt")
    assert read_vectors(tmp_path / "v.pt").layers == (3,)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"layers.3": entry(action="clamp")}, "action 'clamp' at 'layers.3', expected 'add'"),
        ({"layers.3": entry(head_index=0)}, "steers one attention head at 'layers.3'"),
        ({"layers.3": entry(bias=torch.ones(4))}, "has a bias at 'layers.3'"),
        ({"layers.3": entry(feature_index=30)}, "says feature_index at 'layers.3'"),
        ({"layers.3.mlp": entry()}, "steers at 'layers.3.mlp', expected the outputs of blocks only"),
        ({"layers.3.self_attn.o_proj": entry()}, "steers at 'layers.3.self_attn.o_proj'"),
        ({"blocks.3.hook_resid_pre": entry()}, "steers at 'blocks.3.hook_resid_pre'"),
        ({"embed_tokens": entry()}, "steers at 'embed_tokens'"),
        ({"layers.-1": entry()}, "steers at 'layers.-1'"),
        ({3: entry()}, "steers at '3'"),
        ({"layers.3": entry(), "model.layers.3": entry()}, "steers block 3 twice, the second time as 'model.layers.3'"),
        ({"layers.3": entry(), "layers.4": torch.ones(4)}, "holds a Tensor at 'layers.4'"),
        ({"layers.3": {"action": "add"}, "steering_vector": 1}, "holds a dict at 'layers.3'"),
        ({"layers.3": entry(steering_vector=torch.ones(2, 4))}, r"holds \[2, 4\] numbers in float32 at 'layers.3'"),
        ({"layers.3": entry(steering_vector=torch.ones(4).long())}, "numbers in int64 at 'layers.3'"),
        ({"layers.3": entry(steering_vector=torch.tensor([1.0, float("nan")]))}, "1 NaN or infinite numbers"),
        ({"layers.3": entry(), "layers.4": entry(steering_vector=torch.ones(5))}, "layer 4 has d_model=5"),
        ({"layers.3": entry(steering_coefficient="2")}, "no coefficient at 'layers.3': .* must be a number"),
        ({"layers.3": entry(steering_coefficient=True)}, "no coefficient at 'layers.3'"),
        ({"layers.3": entry(steering_coefficient=None)}, "no coefficient at 'layers.3'"),
        ({"layers.3": entry(steering_coefficient=float("inf"))}, "must be finite"),
        ({"layers.3": entry(steering_coefficient=10**400)}, "must be finite"),
        ({"layers.3": entry(steering_vector=torch.full((4,), 1e38), steering_coefficient=100.0)}, "layer 3|finite"),
        (["action", "steering_vector"], "holds a list without entries"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_more_or_less_than_adding_a_vector_says_why(tmp_path, content, problem):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(VectorFileError, match=rf"v\.pt.*(?:{problem})"):
        read_vectors(tmp_path / "v.pt")


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    trap = RunsCode(tmp_path / "it-ran")
    torch.save({"layers.3": entry(bias=trap)}, tmp_path / "v.pt")
    with pytest.raises(VectorFileError, match="reading could run code, so it was not read"):
        read_vectors(tmp_path / "v.pt")
    assert not (tmp_path / "it-ran").exists()


def test_the_warning_says_where_lm_eval_adds(tmp_path):
    with pytest.warns(AllPositionsWarning, match="at every position, the prompt's too, and at all 3 layers at once"):
        write_vectors(some_vectors(), tmp_path / "v.pt", "lm-eval")
    with pytest.warns(AllPositionsWarning, match=r"and at its layer; here steering starts at the end of the instruc"):
        write_lm_eval(some_vectors()[7], tmp_path / "v.pt")


@pytest.mark.parametrize("name", ["v.safetensors", "v.csv", "v", "v.PT"])
def test_a_name_that_lm_eval_would_not_read_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=r"lm-eval goes by the ending of its file: expected v\.pt"):
        write_lm_eval(some_vectors(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_other_families_have_other_names_and_unknown_ones_are_asked_for(tmp_path):
    assert "h.7" in entries(written(some_vectors(), tmp_path / "v.pt", model_type="gpt2"))
    assert "decoder.layers.7" in entries(written(some_vectors(), tmp_path / "v.pt", model_type="opt"))
    assert "backbone.7" in entries(written(some_vectors(), tmp_path / "v.pt", blocks="backbone"))
    with pytest.raises(ValueError, match=r"type 'mamba' have their blocks is not known here.*blocks=\.\.\."):
        write_lm_eval(some_vectors(), tmp_path / "v.pt", model_type="mamba")


def test_eight_bit_numbers_become_float32(tmp_path):
    vectors = some_vectors().to(torch.float8_e4m3fn)
    assert torch.equal(read_vectors(written(vectors, tmp_path / "v.pt")).directions, vectors.directions.float())


@pytest.mark.parametrize(
    ("blocks", "model_type"),
    [(blocks, one) for blocks, types in lm_eval_files.BLOCKS.items() for one in types],
    ids=lambda value: value,
)
def test_every_family_has_its_blocks_where_the_list_says(blocks, model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    if model_type == "gpt_neo":
        config.attention_types, config.attention_layers = [[["global"], 2]], ["global", "global"]
    if hasattr(config, "layer_types"):
        config.layer_types = (config.layer_types or ["full_attention"] * 2)[:2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = dict(model.base_model.named_modules())
    assert f"{blocks}.1" in names
    assert f"{blocks}.2" not in names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("interaction_steering_vectors.pt", {14: torch.arange(8.0)}),
        ("vec_layer_3_interaction_steering_vector.pt", torch.arange(8.0)),
    ],
)
def test_a_file_is_not_taken_for_lm_evals_by_its_name(tmp_path, name, content):
    torch.save(content, tmp_path / name)
    assert not is_lm_eval(tmp_path / name)
    found = read_vectors(tmp_path / name)
    assert torch.equal(found.directions[0], torch.arange(8.0))
