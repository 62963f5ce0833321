"""What is free on a device, on cards that are written down here: no test needs one."""

import gc
import weakref

import pytest
import torch
from helpers.models import random_llama, tiny_model

from caa_lens.engine import shared_prefix
from caa_lens.models.loading import device_memory
from caa_lens.models.loading import load as models
from caa_lens.models.loading.device_memory import free_memory, make_room
from caa_lens.models.loading.load import load_model

GB = 10**9


class Card:
    """A card's bytes, as torch.cuda tells them; what torch holds and does not use goes back with `empty_cache`."""

    def __init__(self, *, total: int, others: int, reserved: int, allocated: int) -> None:
        self.total, self.others, self.reserved, self.allocated = total, others, reserved, allocated
        self.emptied = 0

    def empty_cache(self) -> None:
        self.emptied += 1
        self.reserved = self.allocated

    def install(self, monkeypatch) -> None:
        free = lambda device=None: (self.total - self.others - self.reserved, self.total)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "mem_get_info", free)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.allocated)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty_cache)


@pytest.fixture
def card(monkeypatch):
    """24 GB: 1 in use by others, 20 held by torch, of which 2 are in use."""
    card = Card(total=24 * GB, others=1 * GB, reserved=20 * GB, allocated=2 * GB)
    card.install(monkeypatch)
    return card


def test_memory_that_torch_holds_and_does_not_use_is_free(card):
    assert free_memory("cuda") == free_memory("cuda:0") == 3 * GB + 18 * GB
    card.empty_cache()
    assert free_memory("cuda") == 21 * GB  # returned or not, it is as much


def test_free_memory_is_never_more_than_the_card_has_beside_what_is_used(monkeypatch):
    Card(total=24 * GB, others=-3 * GB, reserved=20 * GB, allocated=2 * GB).install(monkeypatch)  # a driver that errs
    assert free_memory("cuda") == 22 * GB
    Card(total=24 * GB, others=0, reserved=1 * GB, allocated=2 * GB).install(monkeypatch)  # another allocator's numbers
    assert free_memory("cuda") == 22 * GB


def test_the_engine_plans_with_the_same_memory(card, monkeypatch):
    model = tiny_model()
    asked = []
    monkeypatch.setattr(shared_prefix, "free_memory", lambda device: asked.append(device) or free_memory("cuda"))
    per_prefix = shared_prefix.kv_bytes(model, 50)
    monkeypatch.setattr(shared_prefix, "MOST_TOKENS", 10**12)
    assert shared_prefix.prefix_budget(model, 50) == 21 * GB // 4 // per_prefix
    assert asked == [model.W_E.device]


def test_the_allocator_returns_its_memory_only_where_the_device_alone_has_not_enough(card):
    make_room("cuda", 3 * GB)
    assert card.emptied == 0
    make_room("cuda", 4 * GB)
    assert card.emptied == 1
    assert torch.cuda.mem_get_info()[0] == 21 * GB


def test_on_mps_the_drivers_unused_memory_is_free_too(monkeypatch):
    monkeypatch.setattr(device_memory.psutil, "virtual_memory", lambda: type("M", (), {"available": 5 * GB}))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7 * GB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4 * GB)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(True))
    emptied = []
    assert free_memory("mps") == 8 * GB
    assert free_memory("cpu") == 5 * GB
    make_room("mps", 5 * GB)
    assert emptied == []
    make_room("mps", 6 * GB)
    assert emptied == [True]


def test_a_deleted_model_that_its_hook_refers_to_makes_room_for_the_next_one(tmp_path, monkeypatch):
    random_llama(tmp_path / "llama")
    model = load_model(tmp_path / "llama", device="cpu")
    weights = weakref.ref(model.W_E)
    for module in (device_memory, models):
        monkeypatch.setattr(module, "free_memory", lambda device: 0 if weights() is not None else GB)
    with pytest.raises(models.ModelTooLargeError):
        load_model(tmp_path / "llama", device="cpu")
    model.add_hook("blocks.0.hook_resid_post", lambda resid, hook, own=model: None)
    gc.disable()  # else it may come by of itself
    try:
        del model
        assert weights() is not None
        load_model(tmp_path / "llama", device="cpu")
    finally:
        gc.enable()
    assert weights() is None
