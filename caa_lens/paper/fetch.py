"""Fetch the paper's question sets, check them, and write them in our form.

`pooch` downloads. A published file that is there with the checksum on record is not fetched again, so that a fetch that
failed can be taken up: at the first file that is not there whole, and at its beginning (`pooch` does not go on in the
middle of a file; the largest has 3.5 MB). One that comes with another checksum than the one known beforehand, or
recorded at the first fetch, is refused. A file put in place by hand counts as fetched.
"""

import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from caa_lens.atomic_files import write_atomically
from caa_lens.contrast import files as contrast_files
from caa_lens.contrast.files import FieldError
from caa_lens.contrast.pair import ContrastPair
from caa_lens.extras import needed_for
from caa_lens.paper.questions import RECORD, check_name, data_folder, inventory, published_size, read_record
from caa_lens.paper.sources import (
    NAMES,
    PER_SUBJECT,
    QUESTIONS,
    SUBJECTS,
    PublishedFile,
    authors_files,
    original_files,
    places,
    split_anew,
    two_option_rows,
)

with needed_for("fetching the paper's data"):
    import pooch

if TYPE_CHECKING:
    import pandas

CONNECT = 5.0  # seconds for a server to answer at all: without a network the user is told what to do at once
LEFT_OUT = 0.02  # share of a file's questions that may be unusable: they are left out, and told

Rows = dict[str, list[dict[str, str]]]  # of every split


class DownloadError(ConnectionError):
    """A file that did not arrive whole; the message names its address and what to do."""


class PaperDataWarning(UserWarning):
    """A fetched set is not quite what the paper says about it."""


def fetch(
    names: str | Sequence[str] = (),
    *,
    to: str | Path | None = None,
    source: str | Path | None = None,
    original: bool = False,
    timeout: float | int = 30.0,
    progress: bool = True,
) -> "pandas.DataFrame":
    """Get the paper's sets from where they are published.

    Args:
        names: behaviors, `mmlu`, `truthfulqa`; by default all that can be had.
        to: the data folder; `data_folder()` by default.
        source: a folder with the published files, such as a clone of the authors' repository, to take them from instead
            of the network. If it holds only the original files of a set, these are cut.
        original: cut the sets from where the authors took them, also where the authors' own files can be had.
        timeout: seconds that a server may be silent.

    Returns:
        `inventory` of the sets asked for.

    Raises:
        ValueError: there is no such set, or a file is not what it should be.
        FileNotFoundError: `source` lacks a file.
        DownloadError: a `ConnectionError` that says which file to put where instead.

    Warns:
        PaperDataWarning: a set has another size than the paper's, has questions in both halves, or has some that cannot
            be used.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        check_name(name, NAMES)
    folder = data_folder() if to is None else Path(to)
    source = None if source is None else Path(source)
    plans = {name: _plan(name, source, original) for name in wanted or _available(source, original)}
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    with (
        WeakFileLock(folder / f"{RECORD}.lock"),
        tqdm(total=sum(map(len, plans.values())), desc="fetch", unit="file", disable=not progress) as bar,
    ):
        for name, files in plans.items():
            bar.set_postfix_str(name)
            try:
                notes = _fetch_set(name, files, folder, source, timeout)
            except DownloadError as error:
                raise DownloadError(f"{name}: {error}\n{_by_hand(plans, folder, wanted)}") from None
            bar.update(len(files))
            for note in notes:
                warnings.warn(f"{name}: {note}", PaperDataWarning, stacklevel=2)
    found = inventory(folder)
    return found[found["name"].isin(list(plans))].reset_index(drop=True)


def _plan(name: str, source: Path | None, original: bool) -> dict[str, PublishedFile]:
    """The files to make a set of: the authors', unless the original ones are asked for or all that `source` has."""
    authors, originals = authors_files(name), original_files(name)
    if original and not originals:
        raise ValueError(f"{name!r} was written for the paper and has no original: fetch the authors' files")
    preferred = originals if original else authors
    if source is None:
        return preferred
    for files in (preferred, originals):
        if files and all(_in_folder(source, name, file) for file in files.values()):
            return files
    lacking = [file for file in preferred.values() if not _in_folder(source, name, file)]
    raise FileNotFoundError(
        f"{source} lacks files of {name!r}: expected {', '.join(file.path for file in lacking)} in it, as published at "
        f"{', '.join(file.url for file in lacking)}"
    )


def _available(source: Path | None, original: bool) -> list[str]:
    names = []
    for name in NAMES:
        try:
            _plan(name, source, original)
        except (ValueError, FileNotFoundError):
            continue
        names.append(name)
    if not names:
        raise FileNotFoundError(
            f"{source} has none of the paper's sets: expected a clone of the authors' repository, or a folder with "
            f"files such as {next(iter(authors_files(NAMES[0]).values())).path}"
        )
    return names


def _in_folder(source: Path, name: str, file: PublishedFile) -> Path | None:
    """Where a folder has a file: at its path in the repository, or at the part of it from a mention of the set on."""
    parts = file.place.parts
    below_repository = len(parts) - len(Path(file.path).parts)
    for i in range(len(parts)):
        tells_the_set = i <= below_repository or any(name in part for part in parts[i:])
        if tells_the_set and (path := source.joinpath(*parts[i:])).is_file():
            return path
    return None


def _fetch_set(
    name: str, files: dict[str, PublishedFile], folder: Path, source: Path | None, timeout: float | int
) -> list[str]:
    """Obtain a set's files, write it in our form, and return what is to be said about it."""
    earlier, record = read_record(folder), read_record(folder)
    fresh = []
    for file in files.values():
        if _obtain(name, file, folder, record, source, timeout):
            fresh.append(file)
        _write_record(folder, record)
    try:
        splits, notes = _converted(name, files, folder)
    except ValueError as error:
        for file in fresh:  # else the next fetch would find it, and fail in the same way
            (folder / file.place).unlink()
        _write_record(folder, earlier)
        raise ValueError(f"{name}: what was fetched cannot be used: {error}") from None
    _write_set(folder / name, splits)
    kind = "authors" if files == authors_files(name) else "original"
    places_of = {role: file.place.as_posix() for role, file in files.items()}
    record["sets"][name] = {"source": kind, "files": places_of, "notes": notes}
    _write_record(folder, record)
    return notes


def in_place(names: Sequence[str], folder: Path, *, original: bool = False) -> tuple[int, int]:
    """How many published files of some sets (all, if none is named) are in a data folder, and how many there are."""
    plans = {name: _plan(name, None, original) for name in names or _available(None, original)}
    n = sum(len(files) for files in plans.values())
    return n - len(_missing(plans, folder)), n


def _missing(plans: Mapping[str, Mapping[str, PublishedFile]], folder: Path) -> list[PublishedFile]:
    """The files that are not in their places, or are others than they should be there; each once."""
    record, found = read_record(folder)["files"], []
    for files in plans.values():
        for file in files.values():
            path, before = folder / file.place, record.get(file.place.as_posix())
            own = before is not None and before["revision"] == file.revision
            known = file.sha256 or (before["sha256"] if before and own else None)
            digest = pooch.file_hash(str(path)) if path.is_file() else None
            of_another_commit = known is None and before is not None and digest == before["sha256"]
            if digest is None or of_another_commit or (known and digest != known):
                found.append(file)
    return list(dict.fromkeys(found))


def _by_hand(plans: Mapping[str, Mapping[str, PublishedFile]], folder: Path, wanted: Sequence[str]) -> str:
    """What is still missing of all that was asked for, and where to put it."""
    missing, n = _missing(plans, folder), sum(len(files) for files in plans.values())
    there = f"{n - len(missing)} of {n} files are there. " if len(missing) < n else ""
    return (
        f"{there}Or put {'this file' if len(missing) == 1 else f'these {len(missing)} files'} in place yourself, and "
        f"run `{' '.join(['caa-lens data fetch', *wanted])}` again:\n{places(missing, folder)}"
    )


def _obtain(
    name: str,
    file: PublishedFile,
    folder: Path,
    record: dict[str, dict[str, Any]],
    source: Path | None,
    timeout: float | int,
) -> bool:
    """Bring one published file to its place and record it; whether this wrote it."""
    path, key = folder / file.place, file.place.as_posix()
    before = record["files"].get(key)
    recorded = before is not None and before["revision"] == file.revision
    known = file.sha256 or (before["sha256"] if before and recorded else None)
    found = None if source is None else _in_folder(source, name, file)
    if found is not None:
        digest, origin = pooch.file_hash(str(found)), str(found)
        if known not in (None, digest):
            raise ValueError(f"{found} has sha256 {digest}, expected {known}, that of {file.url}")
        write_atomically(path, lambda temporary: shutil.copyfile(found, temporary))
    else:
        if known is None and before and path.is_file() and pooch.file_hash(str(path)) == before["sha256"]:
            path.unlink()  # that of another commit, which pooch would take for this one's, as no checksum is known
        downloaded = download(file.url, path, sha256=known, timeout=timeout)
        if recorded and not downloaded:
            return False
        digest, origin = pooch.file_hash(str(path)), file.url if downloaded else "put in place by hand"
    record["files"][key] = {
        "url": file.url,
        "revision": file.revision,
        "origin": origin,
        "sha256": digest,
        "bytes": path.stat().st_size,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return origin != "put in place by hand"


def download(url: str, path: Path, *, sha256: str | None = None, timeout: float | int = 30.0) -> bool:
    """Have the whole file of an address at `path`, and say whether it was fetched; one with the checksum may be there.

    Until all of it is there and checked, `path` holds what it held before. Proxies and certificates are those of
    `requests`: `HTTPS_PROXY` and `REQUESTS_CA_BUNDLE` are heeded.

    Args:
        sha256: what the checksum has to be; if None, any file that is there will do.
        timeout: seconds that the server may be silent, not for the whole file.

    Raises:
        DownloadError: no connection, no such file, silence, a body that breaks off, or another checksum.
    """
    from requests.exceptions import RequestException

    pooch.get_logger().setLevel("WARNING")  # it would write across the bar
    try:
        action = pooch.retrieve(
            url,
            known_hash=sha256,
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(timeout=(min(CONNECT, timeout), timeout)),
            processor=lambda _, action, __: action,
        )
    except RequestException as error:
        problem = _told(url, error, timeout)
    except ValueError as error:
        problem = f"{url} sent another file than expected, changed where it is published or on its way: {error}"
    else:
        if action != "fetch":
            path.chmod(0o644)  # pooch writes for its owner's eyes only; a cache may be shared
        return action != "fetch"
    if path.is_file():
        problem += f"\n{path} is there, but has sha256 {pooch.file_hash(str(path))}, expected {sha256}"
    raise DownloadError(problem) from None


def _told(url: str, error: Exception, timeout: float | int) -> str:
    """What went wrong with a request, in words."""
    from requests import exceptions

    if isinstance(error, exceptions.HTTPError):
        status, reason = error.response.status_code, error.response.reason  # type: ignore[union-attr]
        if status == 404:
            return f"{url} is not there (404): it was moved or taken down"
        return f"{url}: the server answered {status} {reason}: try again later"
    host, why = urlsplit(url).netloc, str(getattr((error.args or (error,))[0], "reason", error)).rsplit(": ", 1)[-1]
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            f"{host} has a certificate that cannot be verified ({why}): behind a proxy that signs anew, set "
            f"REQUESTS_CA_BUNDLE to its certificate; {url} was not fetched"
        )
    if isinstance(error, exceptions.Timeout) or "timed out" in str(error):  # silence in the middle has no class
        return f"{url} was silent for {timeout:g} s: try again"
    if isinstance(error, exceptions.ChunkedEncodingError | exceptions.ContentDecodingError):
        return f"{url} broke off: try again"
    return f"{host} cannot be reached ({why}): connect; {url} was not fetched"


def _converted(name: str, files: dict[str, PublishedFile], folder: Path) -> tuple[Rows, list[str]]:
    """A set's rows by split, and what is to be said about them.

    Raises:
        ValueError: a file is not what it should be.
    """
    paths = {role: folder / file.place for role, file in files.items()}
    notes: list[str] = []
    splits: Rows = {}
    if name in QUESTIONS:
        splits["questions"] = _usable(two_option_rows(name, paths["questions"]), paths["questions"], notes)
    elif "generate" in paths:
        for split in ("generate", "test"):
            splits[split] = _usable(contrast_files.read_pairs(paths[split], dict), paths[split], notes)
        splits["open_ended"] = [{"question": str(text)} for text in contrast_files.read_questions(paths["open_ended"])]
        if both := {row["question"] for row in splits["generate"]} & {row["question"] for row in splits["test"]}:
            notes.append(f"{len(both)} questions are in both halves, e.g. {min(both)!r}")
    else:
        rows = [row for path in paths.values() for row in _usable(contrast_files.read_pairs(path, dict), path, notes)]
        n_generate, n_test = (published_size(name, split) or 0 for split in ("generate", "test"))
        splits["generate"], splits["test"] = split_anew(rows, n_generate, n_test)
    for split, rows in splits.items():
        expected = published_size(name, split)
        if expected not in (None, len(rows)):
            notes.append(f"{split} has {len(rows)} questions, the paper has {expected}")
    if name == "mmlu":
        subjects = Counter(row["category"] for row in splits["questions"])
        if len(subjects) != SUBJECTS or set(subjects.values()) != {PER_SUBJECT}:
            per_subject = f"{min(subjects.values())} to {max(subjects.values())}"
            notes.append(
                f"{len(subjects)} subjects with {per_subject} questions, the paper has {SUBJECTS} with {PER_SUBJECT}"
            )
    return splits, notes


def _usable(rows: list[dict[str, str]], file: Path, notes: list[str]) -> list[dict[str, str]]:
    """The rows that make a `ContrastPair`; what is left out is noted, and too much of it is an error."""
    usable, problems = [], []
    for i, row in enumerate(rows, start=1):
        try:
            ContrastPair(question=row["question"], positive=row["positive"], negative=row["negative"])
            usable.append(row)
        except FieldError as error:
            problems.append(f"row {i}: {error}")
    if problems:
        note = f"{len(problems)} of {len(rows)} rows of {file} cannot be used, such as {problems[0]}"
        if len(problems) > LEFT_OUT * len(rows):
            raise ValueError(note)
        notes.append(f"{note}; they are left out")
    return usable


def _write_set(target: Path, splits: Rows) -> None:
    """Write a set's files beside their place, then exchange the folder, so that no mixture of two sets is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        for split, rows in splits.items():
            contrast_files.write_rows(made / f"{split}.jsonl", rows)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def _write_record(folder: Path, record: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / RECORD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
