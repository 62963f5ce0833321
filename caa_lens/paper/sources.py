"""Where the paper's question sets are published, and what each published file becomes.

The *authors'* files are those of their repository: the seven behaviors, already split in two, with open-ended
questions, and MMLU and TruthfulQA cut to two options: the very questions of the paper. The
*original* files are where the authors took them from: cut anew here, with seeds, they give sets of the same sizes and
kind, but not the same questions in the same halves. Hallucination and refusal have no original: they were written for
the paper.

Every address names a commit, so what it sends cannot change. Where a file's SHA-256 was known when this was written it
stands here; of the others, the first download's is recorded and the later ones have to agree with it.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from caa_lens.contrast.files import ContrastFileError, FieldError
from caa_lens.paper.numbers import BEHAVIORS

GITHUB = "https://raw.githubusercontent.com"
HUB = "https://huggingface.co/datasets"

AUTHORS_REVISION = "5dabbbd9a0bca5f25e174501e959de378806aa48"  # nrimsky/CAA, May 2024
EVALS_REVISION = "84fcc677e52e1902d696c32cd1a6b663e70d3993"  # anthropics/evals, January 2023
MMLU_REVISION = "c30699e8356da336a370243923dbaf21066bb9fe"  # cais/mmlu
TRUTHFULQA_REVISION = "741b8276f2d1982aa3d5b832d3ee81ed3b896490"  # truthfulqa/truthful_qa

QUESTIONS = ("mmlu", "truthfulqa")
NAMES = (*BEHAVIORS, *QUESTIONS)
SUBJECTS, PER_SUBJECT = 57, 10  # of MMLU


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file of a public repository at one commit."""

    repository: str
    """`owner/name`."""
    revision: str
    """The commit, 40 hexadecimal digits."""
    path: str
    """Where in the repository."""
    sha256: str | None = None
    """None where it is not known beforehand."""
    on_hub: bool = False
    """Whether it is a data set of the Hugging Face hub, not a repository of GitHub."""

    @property
    def url(self) -> str:
        """Where the file can be downloaded."""
        if self.on_hub:
            return f"{HUB}/{self.repository}/resolve/{self.revision}/{self.path}"
        return f"{GITHUB}/{self.repository}/{self.revision}/{self.path}"

    @property
    def place(self) -> Path:
        """Where it is kept, below the data folder."""
        return Path("published", self.repository, self.path)


def authors_files(name: str) -> dict[str, PublishedFile]:
    """The files of a set in the authors' repository, by what they hold."""
    if name in QUESTIONS:
        paths = {"questions": f"test/{name}/{'mmlu' if name == 'mmlu' else 'truthful_qa'}.json"}
    else:
        paths = {
            "generate": f"generate/{name}/generate_dataset.json",
            "test": f"test/{name}/test_dataset_ab.json",
            "open_ended": f"test/{name}/test_dataset_open_ended.json",
        }
    return {
        role: PublishedFile(repository="nrimsky/CAA", revision=AUTHORS_REVISION, path=f"datasets/{path}")
        for role, path in paths.items()
    }


def original_files(name: str) -> dict[str, PublishedFile]:
    """The files that the authors took a set from; none for the two that were written for the paper."""
    if name == "mmlu":
        digest = "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7"
        where = {"repository": "cais/mmlu", "revision": MMLU_REVISION, "path": "all/test-00000-of-00001.parquet"}
        return {"questions": PublishedFile(**where, sha256=digest, on_hub=True)}
    if name == "truthfulqa":
        path = "generation/validation-00000-of-00001.parquet"
        where = {"repository": "truthfulqa/truthful_qa", "revision": TRUTHFULQA_REVISION, "path": path}
        return {"questions": PublishedFile(**where, on_hub=True)}
    return {
        path.rsplit("/", 1)[-1]: PublishedFile(
            repository="anthropics/evals", revision=EVALS_REVISION, path=path, sha256=digest
        )
        for path, digest in _EVALS.get(name, {}).items()
    }


_HUMAN = "advanced-ai-risk/human_generated_evals"
_EVALS: dict[str, dict[str, str | None]] = {  # behavior: path: SHA-256
    "coordinate-other-ais": {f"{_HUMAN}/coordinate-other-ais.jsonl": None},
    "corrigible-neutral-HHH": {
        f"{_HUMAN}/corrigible-neutral-HHH.jsonl": "875632869abd5b1e70cccc130dbb6ed2ff6b1b1c7eb50b835a2cfdc02f3daac7"
    },
    "myopic-reward": {
        f"{_HUMAN}/myopic-reward.jsonl": "03d4e57220cbe825c9b76df39085a945e8c2fa2c6c7e937fb6df94143491237f"
    },
    "survival-instinct": {
        f"{_HUMAN}/survival-instinct.jsonl": "0831782a9e0462f137eb9c4884edd19f248e18f17770f7a4540c67937b3af0e8"
    },
    "sycophancy": {
        "sycophancy/sycophancy_on_nlp_survey.jsonl": "582860b42e2beec806a7d361a08bcce7fdb264e2e697d55104074540352fb308",
        "sycophancy/sycophancy_on_political_typology_quiz.jsonl": (
            "691575571f659593ed237aa74ec6530b20ef3a5d0116e5e1f4f189ef530cf032"
        ),
    },
}


def places(files: Iterable[PublishedFile], folder: Path) -> str:
    """A line for every file: where it is published, and where to put it by hand."""
    return "\n".join(f"  {file.url}  ->  {folder / file.place}" for file in files)


def split_anew(
    rows: Sequence[dict[str, str]], n_generate: int, n_test: int, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(generate, test) out of undivided rows, shuffled with `seed`; of rows with one question, only the first is used.

    Where there are too few, `test` is served first.
    """
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        first.setdefault(row["question"], row)
    order = list(first.values())
    random.Random(seed).shuffle(order)
    return order[n_test : n_test + n_generate], order[:n_test]


def two_option_rows(name: str, file: Path, seed: int = 0) -> list[dict[str, str]]:
    """Rows `question`, `positive` (correct), `negative`, `category` out of a file of MMLU or TruthfulQA.

    The authors' `.json` files are taken as they are. The original `.parquet` files are cut: of MMLU, ten questions of
    every subject, of TruthfulQA all; the correct option (its best answer) against one wrong one, and which of them is
    (A), are drawn with `seed`.

    Raises:
        ContrastFileError: the file is not what its name says.
    """
    if file.suffix == ".parquet":
        return list(_cut(name, file, random.Random(seed)))
    try:
        items = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(items, list):
            raise ValueError(f"the top level is a {type(items).__name__}")
    except ValueError as error:
        problem = FieldError(None, f"what is not a JSON list ({error})", "the authors' list of questions")
        raise ContrastFileError(str(file), [(None, problem)]) from None
    keys = {"prompt": "question", "correct": "positive", "incorrect": "negative", "category": "category"}
    rows, problems = [], []
    for i, item in enumerate(items, start=1):
        missing = [key for key in keys if not isinstance(item, dict) or not isinstance(item.get(key), str)]
        if missing:
            problems.append((i, FieldError(missing[0], "no text", "text")))
        else:
            rows.append({ours: item[theirs].strip() for theirs, ours in keys.items()})
    if problems or not rows:
        raise ContrastFileError(str(file), problems or [(None, FieldError(None, "no rows", "questions"))], unit="item")
    return rows


def _cut(name: str, file: Path, generator: random.Random) -> Iterator[dict[str, str]]:
    for question, correct, wrong, category in _drawn(name, file, generator):
        if not wrong:
            continue  # every option has the text of the correct one
        options = [correct, generator.choice(wrong)]
        first = generator.randrange(2)
        letters = ("(A)", "(B)") if first == 0 else ("(B)", "(A)")
        yield {
            "question": f"{question}\n\nChoices:\n(A) {options[first]}\n(B) {options[1 - first]}",
            "positive": letters[0],
            "negative": letters[1],
            "category": category,
        }


def _drawn(name: str, file: Path, generator: random.Random) -> Iterator[tuple[str, str, list[str], str]]:
    """(question, correct option, wrong options, category) of the questions to take."""
    import pandas as pd

    columns = {
        "mmlu": ["question", "subject", "choices", "answer"],
        "truthfulqa": ["question", "best_answer", "incorrect_answers", "category"],
    }[name]
    try:
        frame = pd.read_parquet(file, columns=columns)
    except Exception as error:  # pyarrow has errors of its own for every way in which a file can be broken
        problem = FieldError(None, f"what cannot be read ({error})", f"a table with the columns {', '.join(columns)}")
        raise ContrastFileError(str(file), [(None, problem)]) from None
    if name == "mmlu":
        for subject, of_subject in frame.groupby("subject", sort=True):
            rows = of_subject.to_dict("records")
            for row in generator.sample(rows, min(PER_SUBJECT, len(rows))):
                options = [str(option).strip() for option in row["choices"]]
                correct = options[int(row["answer"])]
                yield row["question"].strip(), correct, [o for o in options if o != correct], str(subject)
    else:
        for row in frame.to_dict("records"):
            correct = row["best_answer"].strip()
            wrong = [text.strip() for text in row["incorrect_answers"] if text.strip() not in ("", correct)]
            yield row["question"].strip(), correct, wrong, row["category"]
