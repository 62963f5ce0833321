"""Damaged files of every format: a clear error that names the file, or vectors and pairs that are what they say.

A thousand files in an ordinary run. A long one, which prints what came of them:

    CAA_LENS_FUZZ=100000 python -m pytest tests/test_file_fuzz.py -s
"""

import base64
import contextlib
import json
import os
import pickle
import random
import resource
import signal
import time
import warnings
import zlib
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from helpers.file_mutations import RunsCode, damaged
from safetensors.torch import save_file

from caa_lens.contrast.files import ContrastFileError
from caa_lens.contrast.sets import ContrastSet, LetterBalanceWarning, load_open_ended
from caa_lens.file_kinds import VectorFileError
from caa_lens.provenance import Provenance
from caa_lens.vectors import storage
from caa_lens.vectors.formats.caa_files import read_caa_activations
from caa_lens.vectors.formats.control_vectors import PassedOverWarning
from caa_lens.vectors.interchange import read_vectors, write_vectors
from caa_lens.vectors.steering_vectors import SteeringVectors

N_FILES = int(os.environ.get("CAA_LENS_FUZZ", "1000"))
SECONDS = 10  # that one file may take
GROWTH = 700  # MB that the process may grow by
AB = "Do you?\n\nChoices:\n (A) Yes\n (B) No"
ROWS = {
    "ours.jsonl": [{"question": AB, "positive": "(A)", "negative": "(B)"}] * 3,
    "completions.jsonl": [{"question": "How?", "positive": "Well é", "negative": "Badly \u2028"}] * 3,
    "authors.json": [{"question": AB, "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}] * 3,
    "evals.jsonl": [{"question": AB, "answer_matching_behavior": ["(A)"], "answer_not_matching_behavior": [" (B)"]}],
    "truthful.json": [{"question": AB, "correct": "(A)", "incorrect": "(B)"}] * 3,
    "open.json": [{"question": "How are you?"}, {"question": "And now?", "answer": "x"}],
}


def whole_files(folder):
    """Bytes by name of one good file of each form, and of some bad ones that a user may have."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(4, 16, generator=generator)
    provenance = Provenance(model="o/m", behavior="b", n_pairs=3, details={"torch": "2"})
    vectors = SteeringVectors(directions=stack, layers=(1, 3, 4, 9), provenance=provenance)
    made = {}

    def keep(name, write):
        path = folder / name
        write(path)
        made[name] = path.read_bytes()

    keep("ours.safetensors", lambda path: vectors.save(path))
    keep("weights.safetensors", lambda path: save_file({"model.layers.0.mlp.up_proj.weight": stack}, path))
    keep("vec_layer_3_m.pt", lambda path: torch.save(stack[0].clone(), path))
    keep("vec_layer_3.pt", lambda path: torch.save(stack[0].half(), path))
    keep("vec_layer_4_m.pt", lambda path: torch.save(stack[0].clone(), path, _use_new_zipfile_serialization=False))
    keep("activations_pos_3.pt", lambda path: torch.save(stack, path))
    keep("stack.pt", lambda path: torch.save(stack, path))
    keep("early.pt", lambda path: torch.save({3: stack[0].clone()}, path, _use_new_zipfile_serialization=False))
    keep("by_number.pt", lambda path: torch.save({3: stack[0].clone(), 5: stack[1].clone()}, path))
    keep(
        "by_name.pt",
        lambda path: torch.save({"model.layers.3": stack[0].bfloat16(), "layer_5": stack[1].bfloat16()}, path),
    )
    keep("parameter.pt", lambda path: torch.save(torch.nn.Parameter(stack), path))
    keep("trap.pt", lambda path: torch.save({3: RunsCode(folder / "ran-in-the-fuzz")}, path))
    keep("trap.pkl", lambda path: path.write_bytes(pickle.dumps(RunsCode(folder / "ran-in-the-fuzz"), protocol=2)))
    keep("lm-eval.pt", lambda path: torch.save(lm_eval_entries(stack), path))
    keep(
        "lm-eval-early.pt", lambda path: torch.save(lm_eval_entries(stack), path, _use_new_zipfile_serialization=False)
    )
    keep("stack.npy", lambda path: np.save(path, stack.numpy()))
    keep("fortran.npy", lambda path: np.save(path, np.asfortranarray(stack.numpy().astype(">f2"))))
    keep("objects.npy", lambda path: np.save(path, np.array([RunsCode(folder / "ran-in-the-fuzz")], dtype=object)))
    keep("by_name.npz", lambda path: np.savez(path, layer_3=stack[0].numpy(), layer_5=stack[1].numpy()))
    keep("stack.npz", lambda path: np.savez_compressed(path, stack=stack.double().numpy()))
    keep("v.gguf", lambda path: write_vectors(vectors, path))
    keep("more.gguf", more_gguf)
    keep("v.json", lambda path: write_vectors(vectors, path))
    plain = {"data": base64.b64encode(stack.numpy().tobytes()).decode(), "dtype": "float32", "shape": [4, 16]}
    keep("plain.json", lambda path: path.write_text(json.dumps({"activations": plain, "layer_indices": [1, 2, 5, 7]})))
    for name, rows in ROWS.items():
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(json.dumps(row) for row in rows)
        keep(f"pairs-{name}", lambda path, text=text: path.write_text(text))
    return made


def lm_eval_entries(stack):
    """As lm-eval's own users write them, with and without what may be left out."""
    whole = {"action": "add", "steering_vector": stack[0].clone(), "steering_coefficient": 2.5, "head_index": None}
    return {"layers.3": whole, "model.layers.5": {"action": "add", "steering_vector": stack[1].clone()}}


def more_gguf(path):
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "b"])
    writer.add_tensor("direction.2", np.ones(8, np.float16))
    writer.add_tensor("mean", np.ones((2, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def within(seconds):
    def too_long(*_):
        raise BaseException(f"took longer than {seconds} s")  # what no reader catches

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_vectors(vectors):
    """The class's own rules, a provenance of texts, and the way through our own file."""
    again = SteeringVectors(directions=vectors.directions, layers=vectors.layers, provenance=vectors.provenance)
    parts = storage.Parts(again.directions, again.layers, again.provenance)
    directions, layers, provenance = storage._decode(storage._encode(parts))
    assert SteeringVectors(directions=directions, layers=layers, provenance=provenance) == vectors
    assert repr(vectors).encode()


def read_one(path, draw):
    """What came of a file, in a word; raises whatever is no clear error."""
    is_pairs = path.name.startswith("pairs-")
    try:
        if is_pairs:
            loaded = load_open_ended(path) if "open" in path.name else ContrastSet.load(path)
            assert len(loaded) > 0
            assert json.dumps([str(each) for each in loaded], ensure_ascii=False).encode()
            if isinstance(loaded, ContrastSet):
                assert loaded.content_hash
                assert repr(loaded.balance_letters() if loaded.kind == "ab" else loaded)
        elif path.name.startswith("activations"):
            path.with_name("activations_neg_3.pt").write_bytes(path.read_bytes())
            for sides in read_caa_activations(path.parent).values():
                assert all(torch.isfinite(side).all() for side in sides)
        else:
            layers = draw.choice((None, None, None, [5], [7, 2, 1, 30]))
            check_vectors(read_vectors(path, layers=layers, model=draw.choice((None, "o/m"))))
    except (VectorFileError, ContrastFileError) as error:
        told = str(error)
        assert path.name.replace("_pos_", "_") in told.replace("_pos_", "_").replace("_neg_", "_"), told
        assert told.encode()
        assert len(told) < 3000, told[:3000]
        return "refused"
    return "read"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("whole"))


FILES = [
    *["ours.safetensors", "weights.safetensors", "vec_layer_3_m.pt", "vec_layer_3.pt", "vec_layer_4_m.pt"],
    *["activations_pos_3.pt"],
    *["stack.pt", "early.pt", "by_number.pt", "by_name.pt", "parameter.pt", "trap.pt", "trap.pkl"],
    *["lm-eval.pt", "lm-eval-early.pt"],
    *["stack.npy", "fortran.npy", "objects.npy", "by_name.npz", "stack.npz", "v.gguf"],
    *["more.gguf", "v.json", "plain.json"],
    *(f"pairs-{name}" for name in ROWS),
]


BAD = {"weights.safetensors", "trap.pt", "trap.pkl", "objects.npy"}


def test_the_undamaged_files_are_read_and_the_bad_ones_refused(files, tmp_path):
    assert list(files) == FILES

    class NoDraw:
        choice = staticmethod(lambda options: options[0])

    for name, data in files.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        with warnings.catch_warnings():
            for expected in (PassedOverWarning, LetterBalanceWarning):
                warnings.simplefilter("ignore", expected)
            assert read_one(folder / name, NoDraw()) == ("refused" if name in BAD else "read"), name


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_told_by_name_or_read_as_what_it_is(files, tmp_path, name):
    path, others, came = tmp_path / name, list(files.values()), Counter()
    n_files = max(1, N_FILES // len(FILES))
    before, started, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), 0.0
    for n in range(n_files):
        draw = random.Random(zlib.crc32(name.encode()) * 10**6 + n)
        data = damaged(files[name], draw, others)
        path.write_bytes(data)
        begun = time.perf_counter()
        try:
            with warnings.catch_warnings(), within(SECONDS):
                warnings.simplefilter("error")
                for expected in (PassedOverWarning, LetterBalanceWarning):
                    warnings.simplefilter("ignore", expected)
                came[read_one(path, draw)] += 1
        except BaseException as error:
            raise AssertionError(f"{name}, copy {n}: {type(error).__name__}: {error}\n{data[:2000]!r}") from error
        slowest = max(slowest, time.perf_counter() - begun)
    assert not list(tmp_path.parent.glob("*/ran-in-the-fuzz")), "a pickle ran"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    spent = time.perf_counter() - started
    print(f"{name}: {n_files} files, {dict(came)}, {spent:.0f} s, slowest {slowest:.2f} s, {grown:.0f} MB more")
    assert grown < GROWTH
