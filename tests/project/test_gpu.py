"""What `make gpu-wheels` and `make gpu` rest on, as far as it can be held without a card."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from helpers.models import ROOT, random_vectors

from benchmarks.gpu import day, modules, outcomes, table, wheels
from benchmarks.gpu.decode import StaticSteps
from benchmarks.gpu.table import Kept, Row
from caa_lens.prompts.prompt_formats import Prompt
from caa_lens.steering.generation import generate_tokens

MODEL_FIXTURES = re.compile(r"^def \w+\((?:.*\W)?(tiny|tiny_model|tiny_chat|demo_model)\b", re.MULTILINE)
# Of no use on a card: they write pages and figures, ask a command line, or run experiments in processes of their own.
ELSEWHERE = ("cli", "experiments", "families", "interop", "project")


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- what is taken along --------------------------------------------------------------------------------------------


def test_the_wheels_are_those_of_the_pinned_versions_and_under_60_megabytes():
    told = json.loads(wheels.SIZES.read_text())
    assert wheels.unpinned() == []
    versions = {}
    for name in told["bytes"]:
        if name.endswith(".whl"):
            package, version, *_ = name.split("-")
            versions[wheels.plain(package)] = version
    again = "run: make gpu-wheels ARGS=--write-sizes"
    assert versions.pop("caa-lens"), again
    pins = wheels.pinned()
    assert versions == {wheels.plain(name): pins[wheels.plain(name)] for name in wheels.requirements()}, again
    assert not versions.keys() & {"torch", "pyarrow", "scipy", "plotly"}
    wheels.check(told["bytes"])


def test_too_much_is_refused_with_what_is_largest():
    with pytest.raises(ValueError, match=r"are 61\.0 MB, expected at most 60: leave .* \(the largest are b 50"):
        wheels.check({"a": 11_000_000, "b": 50_000_000})


def test_every_module_that_runs_a_model_is_run_on_the_card_or_says_why_not():
    listed = {*modules.RUN, *modules.STAY}
    assert len(listed) == len(modules.RUN) + len(modules.STAY)
    assert [name for name in listed if not (ROOT / name).is_file()] == []
    found = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if file.parent.name not in (*ELSEWHERE, "tests") and MODEL_FIXTURES.search(file.read_text(encoding="utf-8"))
    }
    assert found - listed == set()


def test_a_stand_in_can_be_imported_and_not_used_and_the_package_itself_goes_before():
    script = (
        "from benchmarks.gpu import left_out; left_out.WHY['not_here'] = 'a test'; left_out.WHY['json'] = 'a test'\n"
        "left_out.stand_in()\n"
        "import json, not_here.part as part; from not_here.part import Thing\n"
        "assert json.loads('1') == 1 and issubclass(Thing, object)\n"
        "try: Thing()\n"
        "except ModuleNotFoundError as error: print(error.name, error)"
    )
    done = python("-c", script)
    assert done.stdout.startswith("not_here not_here.part.Thing is used, but not_here (a test) is left out"), (
        done.stderr
    )


def wheel(folder, name, text="x = 1\n"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("thing.py", text)
        archive.writestr("thing-1.data/purelib/more.py", "y = 2\n")


def test_wheels_are_unpacked_once_with_the_stand_ins(tmp_path):
    wheel(tmp_path / "wheels", "thing-1-py3-none-any.whl")
    target = tmp_path / "site"
    day.installed(tmp_path / "wheels", target)
    assert (target / "thing.py").read_text() == "x = 1\n"
    assert (target / "more.py").exists()
    assert "LeftOut" in (target / "sitecustomize.py").read_text()
    (target / "thing.py").unlink()
    day.installed(tmp_path / "wheels", target)
    assert not (target / "thing.py").exists()
    wheel(tmp_path / "wheels", "thing-1-py3-none-any.whl", text="x = 12\n")
    day.installed(tmp_path / "wheels", target)
    assert (target / "thing.py").read_text() == "x = 12\n"


def test_missing_wheels_and_those_of_another_python_are_refused(tmp_path):
    with pytest.raises(day.NotReady, match=r"found no wheels in .*, expected those of `make gpu-wheels`"):
        day.installed(tmp_path, tmp_path / "site")
    wheel(tmp_path / "wheels", "thing-1-cp39-cp39-linux_x86_64.whl")
    with pytest.raises(day.NotReady, match=r"got thing-1-cp39.* is Python .*: gather them again .* GPU_PYTHON=3\.\d+"):
        day.installed(tmp_path / "wheels", tmp_path / "site")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a card")
def test_a_missing_card_is_told_of_with_what_to_do():
    with pytest.raises(day.NotReady, match=r"sees no card, expected one for --device cuda: .*make gpu DEVICE=cpu"):
        day.card("cuda", {**os.environ})
    assert "rehearsal" in day.card("cpu", {**os.environ})


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_each_figure_with_its_aim_and_its_share_of_the_limits(tmp_path):
    kept = Kept(tmp_path / "t.json", "a card")
    kept.put_limit("matrix bfloat16", 8e14)
    kept.put_limit("copy", 3e12)
    kept.put(
        "a", Row(work="w", figure="5 tokens/s", aim="6", met=False, share="7% of copy", against="x|y", memory="1 GiB")
    )
    kept.put("b", Row(work="v", figure="8", aim="8", met=True))
    lines = table.markdown(kept.path).splitlines()
    assert "Measured on a card" in lines[0]
    assert "800 TFLOP/s of a large matrix product in bfloat16; 3000 GB/s of a large copy" in lines[0]
    assert lines[4] == "| w | 5 tokens/s | 6, **missed** | 7% of copy | x/y | 1 GiB |"
    assert lines[5] == "| v | 8 | 8, met |  |  |  |"
    assert {line.count("|") for line in lines[2:]} == {7}
    assert "not measured yet" in table.markdown(tmp_path / "none.json")


def test_rows_are_kept_one_by_one_and_only_what_failed_is_measured_again(tmp_path):
    file = tmp_path / "t.json"
    first = Kept(file, "a card")
    first.put("a", Row(work="w", figure="1"))
    first.put("b", Row(work="w", figure="out of memory", failed=True))
    second = Kept(file, "a card")
    assert second.has("a")
    assert not second.has("b")
    assert not second.has("c")
    other = Kept(file, "another card")
    assert other.rows == {}
    assert "is of a card, this is another card" in other.begun_anew
    assert [one.name for one in tmp_path.iterdir()] == ["t.json"]
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"is not a table of a card .*: move it away"):
        Kept(file, "a card")


def test_a_second_run_at_full_size_measures_nothing_anew(tmp_path):
    keep = tmp_path / "t.json"
    words = ["benchmarks/full_size.py", "--device", "cpu", "--dtype", "float32", "--pairs", "4", "--prompt", "20"]
    words += ["--tokens", "3", "--batches", "1", "--keep", str(keep)]
    first = python(*words)
    assert first.returncode == 0, first.stderr
    rows = json.loads(keep.read_text())["rows"]
    assert [key.removeprefix("tiny float32 ") for key in rows] == [
        "build",
        "extraction",
        "sweep",
        "generation 1",
        "hook 1",
        "static 1",
    ]
    assert "the same tokens" in rows["tiny float32 static 1"]["against"]
    assert "the same tokens" in rows["tiny float32 hook 1"]["against"]
    before = keep.read_bytes()
    assert python(*words).returncode == 0
    assert keep.read_bytes() == before


# ---- steps of fixed shape -------------------------------------------------------------------------------------------


@pytest.mark.hooked
@pytest.mark.parametrize("n_rows", [1, 3])
def test_steps_of_fixed_shape_give_the_tokens_of_the_plain_loop(tiny_model, n_rows):
    model = tiny_model()
    ids = torch.randint(3, 64, (n_rows, 9), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [Prompt.from_tokens(row) for row in ids]
    steering = [(random_vectors(model)[2], 4.0), (random_vectors(model, seed=1)[3], -2.0)]
    loop = generate_tokens(model, prompts, vectors=steering, max_new_tokens=12)
    expected = torch.stack(list(loop), dim=1)
    unsteered = torch.stack(list(generate_tokens(model, prompts, max_new_tokens=12)), dim=1)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN, so that reading it would show
    try:
        steps = StaticSteps(model, prompts, steering, 12)
        with torch.inference_mode():
            assert torch.equal(steps.run(), expected)
            assert torch.equal(steps.run(5), expected[:, :5])  # begun again
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.equal(expected, unsteered)


@pytest.mark.hooked
def test_steps_of_fixed_shape_refuse_prompts_of_different_lengths(tiny):
    with pytest.raises(ValueError, match="got prompts of different lengths, expected one length"):
        StaticSteps(tiny, [Prompt.from_tokens([3, 4, 5]), Prompt.from_tokens([3, 4])], [], 4)


# ---- tests on a device ----------------------------------------------------------------------------------------------


def test_outcomes_are_kept_and_what_passed_is_not_run_again(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "from pathlib import Path\n"
        "import pytest\n"
        "def test_passes(): Path('ran').write_text('x' + (Path('ran').read_text() if Path('ran').exists() else ''))\n"
        "def test_fails(): assert Path('mended').exists()\n"
        "def test_of_a_left_out_package():\n"
        "    raise ModuleNotFoundError('no', name='plotly.graph_objects')\n"
        "def test_of_a_file_format():\n"
        "    raise ImportError(\"Unable to find a usable engine; tried using: 'pyarrow', 'fastparquet'\")\n"
        "def test_of_a_missing_package():\n"
        "    raise ModuleNotFoundError('no', name='numpyy')\n"
    )
    file = tmp_path / "outcomes.jsonl"
    words = ["-m", "pytest", "-p", "benchmarks.gpu.plugin", "-p", "no:cacheprovider", "-q", "-c", os.devnull]

    # The tests that run this one may share their work among several processes; the one started here does not.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def outcome():
        subprocess.run(
            [sys.executable, *words, "--rootdir", str(tmp_path), "test_some.py"],
            cwd=tmp_path,
            env={**alone, "PYTHONPATH": str(ROOT), "CAA_LENS_OUTCOMES": str(file)},
            capture_output=True,
            timeout=120,
        )
        return {test.rpartition("::")[2]: what for test, what in outcomes.read(file).items()}

    first = {"test_passes": "passed", "test_fails": "failed"}
    first |= {"test_of_a_left_out_package": "skipped", "test_of_a_missing_package": "failed"}
    first |= {"test_of_a_file_format": "skipped"}
    assert outcome() == first
    (tmp_path / "mended").touch()
    assert outcome() == first | {"test_fails": "passed"}
    assert (tmp_path / "ran").read_text() == "x"
    with file.open("a") as out:
        out.write('["cut o')
    assert set(outcomes.read(file).values()) == {"passed", "failed", "skipped"}
    assert "1 failed, 2 passed, 2 skipped" in day.tests_row(file, 1).figure
    assert day.tests_row(file, 1).met is False
    assert "the time was up" in day.tests_row(file, None).figure


def test_a_device_that_is_not_there_is_refused():
    done = python("-m", "pytest", "--device", "nowhere", "tests/engine/test_positions.py")
    assert done.returncode == 4
    assert re.search(r"got --device nowhere, but torch .* cannot use it .*: choose one of cpu, card", done.stderr)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, to compile the second device")
def test_the_second_device_computes_and_refuses_what_lies_on_two():
    script = """
import sys; sys.path.insert(0, "tests")
from helpers.host_card import install
install()
import torch
x = torch.arange(6.0).reshape(2, 3)
y = x.to("card")
assert torch.equal((y @ y.T).cpu(), x @ x.T) and y.device.type == "card"
assert torch.equal(y[torch.tensor([1])].cpu(), x[1:]) and torch.equal((y * torch.tensor(2.0)).cpu(), 2 * x)
view = y[:, 1]
view += 1
assert y.tolist() == [[0, 2, 2], [3, 5, 5]]
w = torch.ones(3, device="card", requires_grad=True)
(y @ w).sum().backward()
assert w.grad.tolist() == [3, 7, 7]
n = 0
there = torch.tensor([0], device="card")
for mixed in (lambda: y + x, lambda: torch.cat([y, x]), lambda: x[there], lambda: y.addmm_(x, x.T)):
    try: mixed()
    except RuntimeError as error: n += "device" in str(error)
print(n)
"""
    done = python("-c", script)
    assert done.stdout.split() == ["4"], done.stderr
