"""What the library does only where there is a card: every such line is known, and runs here."""

import re

import pytest
import torch
from helpers.card_calls import READS
from helpers.fake_gpu import GB, HELD, fake_gpu
from helpers.models import ROOT, random_llama

import caa_lens as cl
from caa_lens.demo.made_with import _device
from caa_lens.models.loading.device_memory import devices, free_memory, make_room
from caa_lens.models.loading.load import ModelTooLargeError

# Functions of the library that ask torch about CUDA, or whether a device is one, and the test here that runs them.
ASKING = {
    "caa_lens/demo/made_with.py": {"_device"},
    "caa_lens/models/loading/device_memory.py": {"devices", "free_memory", "make_room"},
    "caa_lens/models/loading/load.py": {"_device"},
}


def test_every_function_that_asks_for_cuda_is_known():
    found = {}
    for path in sorted((ROOT / "caa_lens").rglob("*.py")):
        function = None
        for line in path.read_text(encoding="utf-8").splitlines():
            if named := re.match(r"\s*def (\w+)", line):
                function = named[1]
            if re.search(r"torch\.cuda|== \"cuda\"|return \"cuda\"|\.is_cuda|\.cuda\(", line):
                found.setdefault(str(path.relative_to(ROOT)), set()).add(function)
    assert found == ASKING


def test_devices_and_free_memory_are_the_cards():
    with fake_gpu(memory=HELD.now[0] + 5 * GB) as gpu:
        assert devices()["cuda"] == 2
        before = free_memory("cuda:0")
        held = torch.empty(GB, dtype=torch.uint8, device="cuda")
        assert free_memory("cuda") == before - GB == 4 * GB
        make_room("cuda", 3 * GB)
        assert gpu.emptied == 0
        make_room("cuda", 4.5 * GB)
        assert gpu.emptied == 1
        del held


def test_the_demo_names_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card called {device}")
    assert _device(torch.device("cuda:1")) == "cuda:1 (a card called cuda:1)"
    assert _device(torch.device("cpu")).startswith("cpu (")


@pytest.mark.hooked
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
def test_a_model_is_loaded_straight_to_the_card(tmp_path, device):
    random_llama(tmp_path / "llama")
    with fake_gpu(**READS) as gpu:
        before = gpu.now(0), gpu.now(1)
        model = cl.load_model(tmp_path / "llama", device=device)
        card = 1 if device == "cuda:1" else 0
        assert {str(one.device) for one in (*model.parameters(), *model.buffers())} == {f"cuda:{card}"}
        weights = sum(one.untyped_storage().nbytes() for one in model.parameters())
        assert weights <= gpu.now(card) - before[card] <= 1.1 * weights + 2**20
        assert gpu.now(1 - card) == before[1 - card]
        assert gpu.waits == 0


@pytest.mark.hooked
def test_a_model_that_the_card_has_no_room_for_is_refused_before_it_is_read(tmp_path):
    random_llama(tmp_path / "llama")
    with (
        fake_gpu(memory=HELD.now[0] + 1000, **READS) as gpu,
        pytest.raises(ModelTooLargeError, match=r"cuda has 0\.0 GB free"),
    ):
        cl.load_model(tmp_path / "llama")
    assert gpu.emptied == 1
    with fake_gpu(), pytest.raises(ValueError, match="this machine has 1 cpu, 2 cuda"):
        cl.load_model(tmp_path / "llama", device="cuda:2")
