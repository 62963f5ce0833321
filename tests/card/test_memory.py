"""Peak memory from the fake allocations, against what docs/gpu_memory.md, the engine's budget and the plan say."""

import pytest
import torch
from helpers.card_calls import HELLO, READS, letters, vectors_of
from helpers.fake_gpu import GB, fake_gpu

import caa_lens as cl
from caa_lens.engine import shared_prefix
from caa_lens.models.loading.llama_config import count_parameters
from caa_lens.models.loading.load import HEADROOM

pytestmark = [
    pytest.mark.hooked,
    pytest.mark.filterwarnings("ignore::caa_lens.vectors.extraction.ZeroVectorWarning"),
    pytest.mark.filterwarnings("ignore::caa_lens.contrast.sets.LetterBalanceWarning"),
]
SHAPES = ["7B", "13B", "70B"]
MULTIPLIERS = [-2, -1, 0, 1, 2]


def weights_of(model):
    tensors = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def extra(call, **options):
    """The most bytes that a call holds beside what lay there before."""
    with torch.inference_mode(), fake_gpu(**READS, **options) as gpu:
        before = gpu.now()
        gpu.forget_peak()
        call()
        return gpu.peak() - before


def near(stated):
    return pytest.approx(stated, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_the_parameters(card_model, shape, dtype):
    model = card_model(shape, 2, dtype)
    assert weights_of(model) == pytest.approx(2 * count_parameters(model.cfg), rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompts_keys_and_values_and_its_activations_are_as_stated(card_model, shape):
    model, n_pos = card_model(shape, 4), 150
    with torch.inference_mode(), fake_gpu() as gpu:
        before = gpu.now()
        gpu.forget_peak()
        prefix = shared_prefix.prefill(model, [[1] * n_pos] * 20)
        kept, most = gpu.now() - before, gpu.peak() - before
        del prefix
    stated = 20 * shared_prefix.kv_bytes(model, n_pos)
    assert kept == pytest.approx(stated, rel=0.001)
    in_flight = 20 * n_pos * 2 * (5 * model.cfg.d_model + 4 * model.cfg.d_mlp)
    # In the last block but one, before whose end the last one's keys and values are not there.
    assert most == near(stated * 3 / 4 + in_flight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n_prefix", "n_rows", "n_suffix"), [(150, 20, 2), (150, 3, 20), (1000, 10, 2), (2000, 5, 10)])
def test_an_answer_in_flight_takes_what_the_budget_says(card_model, shape, n_prefix, n_rows, n_suffix):
    model = card_model(shape, 4)
    with torch.inference_mode(), fake_gpu():
        prefix = shared_prefix.prefill(model, [[1] * n_prefix] * 4)
    run = lambda: shared_prefix.run_suffixes(model, prefix, [[[1] * n_suffix] * n_rows] * 4, lambda _, resid: resid)  # noqa: E731
    a_token = 2 * shared_prefix.suffix_numbers(model.cfg, n_prefix + n_suffix)
    assert extra(run) == near(4 * n_rows * n_suffix * a_token)


@pytest.fixture(scope="module", params=["7B"])
def whole(request, card_model):
    """A model of full depth, its weights, and where the engine was checked already."""
    model = card_model(request.param)
    with fake_gpu(**READS):
        shared_prefix.unsupported(model)
    return model


def tokens_of(model, pairs):
    """Tokens of each question up to the instruction's end."""
    form = cl.prompts.resolve_format(model, None)
    return [len(form.encode(model.tokenizer, pair.question).tokens) for pair in pairs]


def test_an_extraction_takes_its_prompts_and_their_activations(whole):
    cfg, pairs = whole.cfg, letters(8)
    n_pos = 8 * (max(tokens_of(whole, pairs)) + 1)  # padded to the longest, with the bracket before the letter
    kept = 8 * 2 * cfg.n_layers * cfg.d_model * 4
    stated = shared_prefix.kv_bytes(whole, n_pos) + 2 * n_pos * (5 * cfg.d_model + 4 * cfg.d_mlp)
    found = extra(lambda: cl.extract(whole, pairs, progress=False))
    assert found == near(stated)
    assert found - stated < kept + 0.1 * stated


def test_a_sweep_takes_its_prompts_and_its_answers(whole):
    cfg, pairs = whole.cfg, letters(16)
    longest = max(tokens_of(whole, pairs))
    in_flight = 16 * 2 * (1 + 4 * cfg.n_layers)  # two tokens of every condition
    stated = shared_prefix.kv_bytes(whole, 16 * longest)
    stated += in_flight * 2 * shared_prefix.suffix_numbers(cfg, longest + 2)
    found = extra(lambda: cl.sweep(whole, pairs, vectors_of(whole), multipliers=MULTIPLIERS, progress=False))
    assert found == near(stated)


def test_generation_takes_room_for_every_text_and_the_prompts_activations(whole):
    cfg, n_new, n_rows = whole.cfg, 4, 40
    question = " ".join(["How was your day, and what did you do all afternoon?"] * 8)
    n_pos = tokens_of(whole, [cl.ContrastPair(question=question, positive=" a", negative=" b")])[0]
    stated = shared_prefix.kv_bytes(whole, n_rows * (n_pos + n_new))
    stated += n_rows * n_pos * 2 * (5 * cfg.d_model + 4 * cfg.d_mlp)
    assert extra(lambda: cl.generate(whole, [question] * n_rows, max_new_tokens=n_new)) == near(stated)


def test_a_run_fits_into_what_the_plan_asks_for_and_uses_it(whole):
    """`load_model` and `experiments` ask for 1.1 times the weights."""
    from experiments.running.plan import memory_bytes
    from experiments.running.settings import RunConfig

    parameters = count_parameters(whole.cfg)
    config = RunConfig.of("meta-llama/Llama-2-7b-chat-hf").model_copy(update={"dtype": "bfloat16"})
    planned = memory_bytes(config, parameters, [])
    assert planned == pytest.approx(HEADROOM * 2 * parameters)
    with fake_gpu() as gpu:
        others = gpu.now() - weights_of(whole)  # models of other tests lie there, too
    calls = {
        "extract": lambda: cl.extract(whole, letters(8), progress=False),
        "sweep": lambda: cl.sweep(whole, letters(4), vectors_of(whole), multipliers=MULTIPLIERS, progress=False),
        "generate": lambda: cl.generate(whole, HELLO * 4, max_new_tokens=2),
    }
    for call in calls.values():
        with fake_gpu(memory=planned + others, **READS) as gpu:  # which raises where there is not enough
            call()
        assert planned * 0.9 <= gpu.peak() - others <= planned


def test_with_more_memory_more_runs_at_once_and_never_more_than_half_of_what_is_free(whole):
    weights = weights_of(whole)
    with fake_gpu() as gpu:
        others = gpu.now() - weights
    peaks = []
    for free in (1 * GB, 4 * GB):
        with fake_gpu(memory=weights + others + free, **READS) as gpu:
            cl.sweep(whole, letters(8), vectors_of(whole), multipliers=MULTIPLIERS, progress=False)
        peaks.append(gpu.peak() - others - weights)
        assert peaks[-1] <= free / 2 * 1.1
    assert peaks[0] < peaks[1]
