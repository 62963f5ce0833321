"""Whatever stands in the place of an argument, public functions take it for what it means or say what they expected.

`tests/helpers/odd_arguments.py` makes the calls, some thousands, in a process of its own (every public function with
every kind of odd value takes two minutes, so a sixth of the calls is made; all of them with CAA_LENS_ODD_ALL=1).
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "helpers" / "odd_arguments.py"
ALL = bool(os.environ.get("CAA_LENS_ODD_ALL"))
OURS = str(Path("caa_lens") / "")
# What fails in a caller's own function, or says in Python's words that there is nothing to go through.
FOREIGN = {("extract", "estimator"), ("every function", "tensor of one")}
# Numbers of numpy and torch mean what they say.
TAKEN = {
    ("generate", "max_new_tokens"): {"numpy int", "tensor of one"},
    ("generate", "temperature"): {"0", "1.5", "2**70", "1e300", "numpy int", "numpy float", "tensor of one"},
    ("generate", "seed"): {"None", "0", "numpy int", "tensor of one"},
    ("generate", "system"): {"None", "''"},
    ("generate", "prompt_format"): {"None"},
    ("steer", "multiplier"): {"-1", "0", "1.5", "numpy int", "numpy float", "tensor", "tensor of one"},
    ("transfer", "multiplier"): {"-1", "0", "1.5", "numpy int", "numpy float", "tensor of one"},
    ("sweep", "layers"): {"None", "array", "tensor"},
    ("sweep", "multipliers"): {"array", "tensor"},
    ("extract", "batch_size"): {"2**70", "10**400", "numpy int", "tensor of one"},
    ("logit_lens", "multiplier"): {"-1", "1.5", "2**70", "numpy int", "numpy float", "tensor of one"},
    ("ContrastSet.split", "test"): {"numpy int", "numpy float"},
    ("ContrastSet.split", "seed"): {"None", "0", "numpy int", "tensor of one"},
    ("Sweep.summary", "seed"): {"None", "0", "numpy int", "tensor of one"},
    ("Sweep.summary", "n_resamples"): {"0", "numpy int", "tensor of one"},
    ("SteeringVector", "layer"): {"0", "2**70", "10**400", "numpy int"},
}


@pytest.fixture(scope="module")
def said():
    run = [sys.executable, "-W", "ignore", str(SCRIPT), "1" if ALL else "6"]
    paths = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[1])])  # the package of this tree, and `helpers`
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths, "TQDM_DISABLE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_odd_value_is_taken_or_refused_in_our_words_before_anything_ran_or_was_written(said):
    assert len(said) > (8000 if ALL else 1300)
    wrong = []
    for what, argument, odd, kind, text, where, n_run, files in said:
        if not kind or (what, argument) in FOREIGN or ("every function", odd) in FOREIGN:
            continue
        of_ours = kind in {"TypeError", "ValueError", "IndexError"} or "File" in kind or kind == "FieldError"
        if not of_ours or OURS not in where or n_run or files:
            wrong.append(
                f"{what}({argument}={odd}): {kind}: {text[:100]} ({where[-40:]}, {n_run} modules ran, {files})"
            )
    assert not wrong, "\n".join(wrong)


def test_what_is_taken_is_what_means_one_thing_only(said):
    taken = defaultdict(set)
    for what, argument, odd, kind, *_ in said:
        if not kind:
            taken[what, argument].add(odd)
    for key, odd in TAKEN.items():
        assert taken[key] - {"2**70"} <= odd, key
        assert not ALL or odd <= taken[key], key
    numbers = {"multiplier", "multipliers", "seed", "batch_size", "k", "layers", "layer", "max_tokens", "background"}
    for (what, argument), odd in taken.items():
        if argument in numbers:
            assert not odd & {"True", "numpy bool", "[True]", "'3'", "['3']", "nan", "numpy nan", "inf"}, (
                what,
                argument,
            )
