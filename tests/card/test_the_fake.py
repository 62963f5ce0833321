"""The fake GPU itself: it notices what a card would, and counts what it should."""

import warnings

import pytest
import torch
from helpers.fake_gpu import GB, HELD, fake_gpu


def counts(call, **options):
    with fake_gpu(**options) as gpu:
        call()
    return gpu.waits, gpu.uploads


def test_it_counts_what_waits_and_what_goes_up():
    def waits():
        x = torch.ones(3, device="cuda")
        float(x.sum()), bool((x > 0).any()), x.tolist(), x.cpu(), x.to("cpu"), torch.cuda.synchronize()
        torch.empty(3).copy_(x)

    def uploads():
        torch.tensor([1, 2], device="cuda"), torch.as_tensor(2.0, device="cuda"), torch.ones(3).to("cuda")
        torch.ones(3, device="cuda")[torch.tensor([0, 1])]
        torch.ones(3, device="cuda")[[0, 1]]

    def neither():
        x = torch.arange(3, device="cuda")
        (x + torch.tensor(2.0)).to("cuda").sum()

    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert counts(waits) == (7, 0)
            assert counts(uploads) == (0, 5)
            assert counts(neither) == (0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: torch.ones(3, device="cuda") + torch.ones(3),
        lambda: torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1"),
        lambda: torch.ones(3, device="cuda").masked_fill(torch.ones(3, dtype=torch.bool), 0.0),
        lambda: torch.ones(3)[torch.tensor([0], device="cuda")],
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.ones(3, device="cuda").uniform_(generator=torch.Generator()),
        lambda: torch.nn.functional.embedding(torch.tensor([1]), torch.ones(3, 2, device="cuda")),
        lambda: torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2, device="cuda")),
        lambda: torch.cat([torch.ones(1), torch.ones(1, device="cuda")]),
        lambda: torch.ones(3, device="cuda").nonzero(),
        lambda: torch.ones(3, device="cuda")[torch.ones(3, device="cuda") > 0],
    ],
)
def test_it_raises_where_devices_differ_or_a_size_depends_on_values(wrong):
    for context in (torch.no_grad, torch.inference_mode):
        with context(), fake_gpu(), pytest.raises(RuntimeError):
            wrong()


def test_whole_numbers_that_went_up_come_down_as_they_were_also_out_of_pieces_and_sums():
    with fake_gpu():
        up = torch.tensor([3, 1, 2]).to("cuda")
        assert up.tolist() == [3, 1, 2]
        assert [piece.tolist() for piece in up.split(2)] == [[3, 1], [2]]
        assert (up + up[0]).tolist() == [6, 4, 5]
        assert bool((up == 1).any())
        assert not bool((up == 7).any())
        up[0] = 9
        assert up.tolist() == [1, 1, 1]  # no longer known: ones


def test_a_number_reads_as_what_is_said_of_the_function_that_reads_it():
    with fake_gpu(test_a_number_reads_as_what_is_said_of_the_function_that_reads_it=False):
        assert float(torch.ones(1, device="cuda") * 5) == 1.0  # only functions of the library have names here


def test_memory_is_that_of_the_tensors_alive_at_once():
    memory = HELD.now[0] + 10 * GB  # models of other tests lie there, too
    with fake_gpu(memory=memory) as gpu:
        before = gpu.now()
        first = torch.empty(10**9, dtype=torch.bfloat16, device="cuda")
        view = first[:5].unsqueeze(0)
        assert gpu.now() - before == 2 * GB
        second = first + 1
        assert torch.cuda.mem_get_info("cuda") == (memory - gpu.now(), memory)
        del first
        assert gpu.now() - before == 4 * GB  # a view holds it
        del view
        assert gpu.now() - before == 2 * GB
        assert gpu.peak() - before == 4 * GB
        gpu.forget_peak()
        second += 1
        assert gpu.peak() - before == 2 * GB
        assert torch.cuda.memory_allocated() == gpu.now()
        torch.cuda.empty_cache()
        assert gpu.emptied == 1


def test_two_cards_have_a_memory_each():
    with fake_gpu() as gpu:
        before = gpu.now(0), gpu.now(1)
        on_second = torch.empty(1000, dtype=torch.uint8, device="cuda:1")
        assert (gpu.now(0), gpu.now("cuda:1")) == (before[0], before[1] + 1000)
        moved = on_second.to("cuda:0")
        assert (gpu.now(0), gpu.now(1)) == (before[0] + 1000, before[1] + 1000)
        assert str(moved.device) == "cuda:0"
        assert gpu.waits == gpu.uploads == 0  # from card to card


def test_what_asks_for_more_than_there_is_is_refused():
    with fake_gpu(memory=HELD.now[0] + 2 * GB) as gpu:
        before = gpu.now()
        held = torch.empty(GB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="asked of cuda:0"):
            held + torch.ones(2 * GB, dtype=torch.uint8, device="cuda")
        assert gpu.now() - before == GB  # what was refused does not lie there


def test_attention_is_one_operation_that_is_multiplied_out():
    from benchmarks.passes import flops

    def attend():
        q = torch.ones(1, 8, 5, 16, device="cuda", dtype=torch.bfloat16)
        k = torch.ones(1, 2, 7, 16, device="cuda", dtype=torch.bfloat16)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    with torch.inference_mode():
        assert flops(attend) == 2 * 2 * 8 * 5 * 7 * 16
        with fake_gpu() as gpu:
            before = gpu.now()
            gpu.forget_peak()
            out = attend()
    assert tuple(out.shape) == (1, 8, 5, 16)
    assert gpu.peak() - before == 2 * 16 * (8 * 5 + 2 * 7 + 8 * 5)  # no pattern is held


def test_gradients_and_tangents_are_there():
    import torch.autograd.forward_ad as forward_ad

    with fake_gpu() as gpu, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.ones(4, 4, device="card", requires_grad=True)
        (weight @ weight).sum().backward()
        assert (str(weight.grad.device), weight.grad.shape) == ("card:0", (4, 4))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.zeros(3, device="cuda"), torch.ones(3, device="cuda"))
            assert forward_ad.unpack_dual(dual.exp()).tangent.device.type == "cuda"
    assert gpu.waits == 0


def test_outside_the_block_there_is_no_card():
    with fake_gpu():
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
    assert not torch.cuda.is_available()
    assert torch.ones(2).tolist() == [1.0, 1.0]
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
