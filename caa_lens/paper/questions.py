"""The paper's question sets, as `caa-lens data fetch` left them in the user's cache.

    <cache>/data/fetched.json                      what was fetched: address, commit, SHA-256, size, time
    <cache>/data/published/<owner>/<repository>/   the published files, byte for byte
    <cache>/data/<behavior>/                       generate.jsonl, test.jsonl, open_ended.jsonl
    <cache>/data/mmlu/, truthfulqa/                questions.jsonl, each with its category

`sources` says where they come from, `fetch` gets them.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caa_lens.contrast import files as contrast_files
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet
from caa_lens.extras import needed_for
from caa_lens.paper.numbers import BEHAVIORS, DATASET_SIZES
from caa_lens.paper.sources import NAMES, PER_SUBJECT, QUESTIONS, SUBJECTS, authors_files, places

if TYPE_CHECKING:
    import pandas

RECORD = "fetched.json"
SPLITS = ("generate", "test", "open_ended", "questions")


def data_folder() -> Path:
    """Where fetched sets lie: `data` in the user's cache, or in the folder that `CAA_LENS_CACHE` names."""
    with needed_for("the paper's questions", extra="experiments"):
        import platformdirs

    override = os.environ.get("CAA_LENS_CACHE")
    return (Path(override).expanduser() if override else platformdirs.user_cache_path("caa_lens")) / "data"


def load_paper_set(behavior: str, folder: str | Path | None = None) -> tuple[ContrastSet, ContrastSet, list[str]]:
    """(generate, test, open-ended questions) of one of the paper's behaviors, as fetched.

    There are no open-ended questions, and the list is empty, where the set was cut from the original files.

    Raises:
        ValueError: the paper has no such behavior.
        FileNotFoundError: it was not fetched; the message says how to.
    """
    check_name(behavior, BEHAVIORS)
    folder = data_folder() if folder is None else Path(folder)
    generate = _load(behavior, "generate", folder)
    open_ended = folder / behavior / "open_ended.jsonl"
    questions = contrast_files.read_questions(open_ended) if open_ended.is_file() else []
    return generate, _load(behavior, "test", folder), [str(question) for question in questions]


def load_paper_questions(name: str, folder: str | Path | None = None) -> tuple[ContrastSet, tuple[str, ...]]:
    """MMLU or TruthfulQA with two options a question, and the category of each; the correct answer is positive.

    The paper's number for TruthfulQA is the unweighted mean over categories of each category's mean.

    Raises:
        ValueError: the name is neither `mmlu` nor `truthfulqa`.
        FileNotFoundError: it was not fetched; the message says how to.
    """
    check_name(name, QUESTIONS)
    folder = data_folder() if folder is None else Path(folder)
    pairs = _load(name, "questions", folder)
    lines = (folder / name / "questions.jsonl").read_text(encoding="utf-8").split("\n")
    return pairs, tuple(json.loads(line)["category"] for line in lines if line)


def inventory(folder: str | Path | None = None) -> "pandas.DataFrame":
    """What has been fetched: one row a set and split.

    Columns: name, split, pairs (their number), published (the paper's number; NaN where it states none), letters (how
    often each is the positive answer), source (`authors` or `original`), sha256 (of the published file; of several,
    joined by `+`).
    """
    import pandas as pd

    folder = data_folder() if folder is None else Path(folder)
    record = read_record(folder)
    rows: list[dict[str, Any]] = []
    for name, split in itertools.product(NAMES, SPLITS):
        of_set, file = record["sets"].get(name), folder / name / f"{split}.jsonl"
        if of_set and file.is_file():
            pairs: list[dict[str, str]] = [] if split == "open_ended" else contrast_files.read_pairs(file, dict)
            letters = sorted(Counter(pair["positive"] for pair in pairs).items())
            keys = [of_set["files"][split]] if split in of_set["files"] else of_set["files"].values()
            rows.append(
                {
                    "name": name,
                    "split": split,
                    "pairs": len(pairs) or len(contrast_files.read_questions(file)),
                    "published": published_size(name, split),
                    "letters": ", ".join(f"{letter} {n}" for letter, n in letters),
                    "source": of_set["source"],
                    "sha256": "+".join(record["files"][key]["sha256"] for key in keys),
                }
            )
    columns = ["name", "split", "pairs", "published", "letters", "source", "sha256"]
    return pd.DataFrame(rows, columns=columns).astype({"pairs": int, "published": float})


def published_size(name: str, split: str) -> int | None:
    """How many questions the paper has of a set; None where it does not say."""
    return SUBJECTS * PER_SUBJECT if name == "mmlu" else DATASET_SIZES.get(name, {}).get(split)


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """`fetched.json`: `files` (by their place below the folder) and `sets` (by name); both empty where it is missing.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {"files": {}, "sets": {}}
    try:
        record: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        for file in record["files"].values():
            file["revision"], file["sha256"]
        for one in record["sets"].values():
            one["source"], [record["files"][key] for key in one["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: delete it, and run `caa-lens data fetch` again") from None
    return record


def check_name(name: str, names: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is not among the names."""
    if name not in names:
        raise ValueError(f"got {name!r}, expected one of {', '.join(names)}")


def _load(name: str, split: str, folder: Path) -> ContrastSet:
    file = folder / name / f"{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(
            f"the paper's {name!r} is not in {folder}: run `caa-lens data fetch {name}`. Without network, put these "
            f"files there first:\n{places(authors_files(name).values(), folder)}"
        )
    loaded = ContrastSet(name=name, pairs=tuple(contrast_files.read_pairs(file, ContrastPair)), source=str(file))
    loaded.warn_if_unbalanced(stacklevel=4)
    return loaded
