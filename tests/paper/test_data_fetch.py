"""Fetching: checked, recorded, taken up after a fault, and never half there."""

import hashlib
import json
import shutil

import pandas as pd
import pytest
from helpers.models import SHARED
from helpers.published import ab_rows, contents, question_rows, serving, write_published

from caa_lens.contrast.sets import ContrastSet
from caa_lens.paper import sources as data_sources
from caa_lens.paper.fetch import DownloadError, PaperDataWarning, fetch
from caa_lens.paper.questions import load_paper_questions, load_paper_set, read_record
from caa_lens.paper.sources import authors_files, original_files

REFUSAL = authors_files("refusal")


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A stand-in for the two hosts: its folder, its faults, and the paths that were asked for."""
    site, faults = tmp_path / "site", {}
    site.mkdir()
    with serving(site, faults) as (address, asked):
        monkeypatch.setattr(data_sources, "GITHUB", address)
        monkeypatch.setattr(data_sources, "HUB", f"{address}/hub")
        yield site, faults, asked


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "data"


def get(names, folder, **options):
    return fetch(names, to=folder, progress=False, timeout=options.pop("timeout", 5), **options)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_set_has_the_published_sizes_and_lands_in_our_form(web, folder):
    site, _, asked = web
    for name in data_sources.NAMES:
        write_published(site, name, server=True)
    found = get((), folder)
    assert found["name"].unique().tolist() == list(data_sources.NAMES)
    sized = found[found["published"].notna()]
    assert (sized["pairs"] == sized["published"]).all()
    assert len(sized) == 7 * 2 + 1
    assert set(found["source"]) == {"authors"}
    assert len(asked) == len(set(asked)) == 7 * 3 + 2
    saved = folder / "refusal" / "again.jsonl"
    ContrastSet.load(folder / "refusal" / "test.jsonl").save(saved)
    assert saved.read_bytes() == (folder / "refusal" / "test.jsonl").read_bytes()


def test_the_record_tells_address_commit_checksum_size_and_time_of_every_file(web, folder):
    site, _, _ = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    record = read_record(folder)
    assert record["sets"]["refusal"]["source"] == "authors"
    for role, file in REFUSAL.items():
        entry = record["files"][record["sets"]["refusal"]["files"][role]]
        body = (folder / file.place).read_bytes()
        assert entry["url"] == entry["origin"] == file.url
        assert entry["revision"] == data_sources.AUTHORS_REVISION
        assert entry["sha256"] == hashlib.sha256(body).hexdigest()
        assert entry["bytes"] == len(body)
        assert pd.Timestamp(entry["time"]).tz is not None
        assert json.loads(body) == contents("refusal")[role]


def test_what_was_fetched_is_not_fetched_again(web, folder):
    site, _, asked = web
    write_published(site, "refusal", server=True)
    first = get("refusal", folder)
    before = read_record(folder)
    asked.clear()
    pd.testing.assert_frame_equal(get("refusal", folder), first)
    assert asked == []
    assert read_record(folder) == before


@pytest.mark.parametrize("fault", ["truncate", 404, 500, "hang"])
def test_a_fault_says_which_file_to_put_where_and_the_next_call_takes_up_from_there(web, folder, fault):
    site, faults, asked = web
    write_published(site, "refusal", server=True)
    faults["test_dataset_ab.json"] = fault
    with pytest.raises(DownloadError) as raised:
        get("refusal", folder, timeout=0.3)
    for role, file in REFUSAL.items():  # the first came whole
        assert (f"{file.url}  ->  {folder / file.place}" in str(raised.value)) == (role != "generate")
    assert "1 of 3 files are there" in str(raised.value)
    assert "run `caa-lens data fetch refusal` again" in str(raised.value)
    done = REFUSAL["generate"].place.as_posix()
    assert files_in(folder) == {"fetched.json", "fetched.json.lock", done}

    faults.clear()
    asked.clear()
    get("refusal", folder)
    assert not any("generate_dataset" in path for path in asked)
    assert len(load_paper_set("refusal", folder)[1]) == 50


def test_a_file_put_where_the_message_said_is_taken_without_network(web, folder, tmp_path):
    _, faults, asked = web
    faults[""] = 503  # whatever is asked for
    clone = write_published(tmp_path / "clone", "refusal")
    for file in REFUSAL.values():
        target = folder / file.place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone / file.path, target)
    get("refusal", folder)
    assert asked == []
    assert {entry["origin"] for entry in read_record(folder)["files"].values()} == {"put in place by hand"}


def test_a_damaged_file_is_fetched_again(web, folder):
    site, _, asked = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    target = folder / REFUSAL["test"].place
    whole = target.read_bytes()
    target.write_bytes(whole[:100])
    asked.clear()
    get("refusal", folder)
    assert target.read_bytes() == whole
    assert len(asked) == 1


def test_a_file_that_comes_back_different_is_refused(web, folder):
    site, _, _ = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    rows = load_paper_set("refusal", folder)[1].pairs
    (folder / REFUSAL["test"].place).unlink()
    write_published(site, "refusal", server=True, test=ab_rows("changed", 50))
    with pytest.raises(DownloadError, match=r"sent another file than expected, .*: expected [0-9a-f]{64} but got"):
        get("refusal", folder)
    assert load_paper_set("refusal", folder)[1].pairs == rows


def test_another_pinned_commit_is_fetched_anew(web, folder, monkeypatch):
    site, _, asked = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    monkeypatch.setattr(data_sources, "AUTHORS_REVISION", "1" * 40)
    write_published(site, "refusal", server=True, test=ab_rows("newer", 50))
    asked.clear()
    get("refusal", folder)
    assert len(asked) == 3
    assert load_paper_set("refusal", folder)[1].pairs[0].question.startswith("newer")


def test_a_file_of_another_commit_put_in_place_by_hand_is_taken(web, folder, monkeypatch):
    site, faults, _ = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    monkeypatch.setattr(data_sources, "AUTHORS_REVISION", "1" * 40)
    faults[""] = 503
    with pytest.raises(DownloadError, match="put these 3 files in place yourself"):
        get("refusal", folder)
    changed = {"generate": ab_rows("newer", 408), "test": ab_rows("newest", 50), "open_ended": [{"question": "Newer?"}]}
    for role, file in authors_files("refusal").items():
        (folder / file.place).write_text(json.dumps(changed[role]))
    get("refusal", folder)
    assert load_paper_set("refusal", folder)[1].pairs[0].question.startswith("newest")
    assert {entry["origin"] for entry in read_record(folder)["files"].values()} == {"put in place by hand"}


def test_a_known_checksum_is_asked_for_at_the_first_fetch(web, folder):
    site, _, _ = web
    (file,) = original_files("myopic-reward").values()
    path = site / file.repository / file.revision / file.path
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(ab_rows("short", 1)[0]) + "\n")
    with pytest.raises(DownloadError, match=f"expected {file.sha256}"):
        get("myopic-reward", folder, original=True)
    assert not (folder / file.place).exists()


def test_what_is_no_data_is_refused_removed_and_the_earlier_set_stays(web, folder):
    site, _, _ = web
    write_published(site, "refusal", server=True)
    path = site / REFUSAL["test"].repository / REFUSAL["test"].revision / REFUSAL["test"].path
    good = path.read_bytes()
    path.write_text("<html>Sign in to the wireless network</html>")
    with pytest.raises(ValueError, match=r"refusal: what was fetched cannot be used: .*test_dataset_ab\.json"):
        get("refusal", folder)
    assert not (folder / REFUSAL["test"].place).exists()
    assert not (folder / "refusal").exists()
    path.write_bytes(good)
    assert len(get("refusal", folder)) == 3


def test_sizes_other_than_the_papers_are_told(web, folder):
    site, _, _ = web
    write_published(site, "refusal", server=True, test=ab_rows("refusal test", 49))
    with pytest.warns(PaperDataWarning, match="refusal: test has 49 questions, the paper has 50"):
        found = get("refusal", folder)
    assert found.set_index("split").loc["test", ["pairs", "published"]].tolist() == [49, 50]


def test_questions_in_both_halves_are_told(web, folder):
    site, _, _ = web
    rows = contents("refusal")["test"]
    rows[7] = contents("refusal")["generate"][3]
    write_published(site, "refusal", server=True, test=rows)
    with pytest.warns(PaperDataWarning, match="1 questions are in both halves, e.g. 'refusal generate 3"):
        get("refusal", folder)


def test_a_few_unusable_rows_are_left_out_and_told_and_many_are_an_error(web, folder):
    site, _, _ = web
    rows = contents("refusal")["generate"]
    rows[4] = {**rows[4], "question": "Same?\n\nChoices:\n (A) Yes\n (B) Yes"}
    write_published(site, "refusal", server=True, generate=rows)
    with pytest.warns(PaperDataWarning) as told:
        get("refusal", folder)
    texts = [str(warning.message) for warning in told]
    assert "1 of 408 rows" in texts[0]
    assert "row 5: question: found 2 options 'Yes'" in texts[0]
    assert texts[1] == "refusal: generate has 407 questions, the paper has 408"

    write_published(site, "mmlu", server=True, questions=[{**row, "correct": "(C)"} for row in question_rows("ab", 5)])
    with pytest.raises(ValueError, match="10 of 10 rows"):
        get("mmlu", folder)


def test_mmlu_of_other_subjects_is_told(web, folder):
    site, _, _ = web
    rows = question_rows([f"s{i}" for i in range(56)], 10) + question_rows(["s0"], 10)
    write_published(site, "mmlu", server=True, questions=rows)
    with pytest.warns(PaperDataWarning, match="56 subjects with 10 to 20 questions, the paper has 57 with 10"):
        get("mmlu", folder)


def test_messy_rows_come_out_tidy(web, folder):
    site, _, _ = web
    rows = contents("refusal")["test"]
    options = "\n".join(f" ({letter}) {letter * 2}" for letter in "ABCDEFG")
    rows[0] = {
        "question": f"  Question: Which?\n\nChoices:\n{options}\nAnswer:",
        "answer_matching_behavior": [" (G)", " (B)"],
        "answer_not_matching_behavior": " (A)",
    }
    write_published(site, "refusal", server=True, test=rows)
    get("refusal", folder)
    pair = load_paper_set("refusal", folder)[1][0]
    assert pair.question == f"Which?\n\nChoices:\n{options}"
    assert (pair.positive, pair.negative) == ("(G)", "(A)")


@pytest.mark.parametrize("beginning", ["", "datasets", "datasets/test/.."])
def test_a_clone_or_a_part_of_it_serves_without_network(web, folder, tmp_path, beginning):
    _, _, asked = web
    clone = write_published(tmp_path / "clone", "sycophancy")
    found = get((), folder, source=clone / beginning)
    assert found["name"].unique().tolist() == ["sycophancy"]
    assert asked == []
    assert len(load_paper_set("sycophancy", folder)[0]) == 1000


def test_another_machines_data_folder_serves_too(web, folder, tmp_path):
    site, _, asked = web
    write_published(site, "refusal", server=True)
    get("refusal", folder)
    asked.clear()
    found = get("refusal", tmp_path / "other", source=folder)
    assert asked == []
    assert found["sha256"].tolist() == get("refusal", folder)["sha256"].tolist()


def test_a_source_without_the_files_says_which_are_expected(folder, tmp_path):
    clone = write_published(tmp_path / "clone", "refusal")
    (clone / REFUSAL["test"].path).unlink()
    with pytest.raises(FileNotFoundError, match=r"expected datasets/test/refusal/test_dataset_ab\.json in it"):
        get("refusal", folder, source=clone)
    with pytest.raises(FileNotFoundError, match="has none of the paper's sets"):
        get((), folder, source=tmp_path / "nowhere")


def test_a_source_that_disagrees_with_what_was_recorded_is_refused(folder, tmp_path):
    clone = write_published(tmp_path / "clone", "refusal")
    get("refusal", folder, source=clone)
    write_published(clone, "refusal", test=ab_rows("changed", 50))
    with pytest.raises(ValueError, match=r"test_dataset_ab\.json has sha256 [0-9a-f]{64}, expected"):
        get("refusal", folder, source=clone)


def test_where_there_is_only_the_raw_file_it_is_split_in_the_papers_sizes_and_the_authors_files_are_preferred(
    folder, tmp_path
):
    (raw,) = original_files("coordinate-other-ais").values()
    source = tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({**row, "answer_matching_behavior": " " + row["answer_matching_behavior"]})
             for row in ab_rows("raw", 420)]  # fmt: skip
    (source / "coordinate-other-ais.jsonl").write_text("\n".join([*lines, lines[0]]))
    found = get("coordinate-other-ais", folder, source=source)
    assert found[["split", "pairs", "source"]].values.tolist() == [
        ["generate", 360, "original"],
        ["test", 50, "original"],
    ]
    generate, test, open_ended = load_paper_set("coordinate-other-ais", folder)
    assert len(set(generate.pairs) | set(test.pairs)) == 410
    assert open_ended == []

    write_published(source, "coordinate-other-ais")
    found = get("coordinate-other-ais", folder, source=source)
    assert set(found["source"]) == {"authors"}
    assert len(load_paper_set("coordinate-other-ais", folder)[2]) == 3
    assert set(get("coordinate-other-ais", folder, source=source, original=True)["source"]) == {"original"}
    assert load_paper_set("coordinate-other-ais", folder)[0].pairs == generate.pairs
    assert raw.place.as_posix() in files_in(folder)


def test_too_few_raw_rows_are_told(folder, tmp_path):
    rows = ab_rows("raw", 100)
    (tmp_path / "coordinate-other-ais.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(PaperDataWarning, match="generate has 50 questions, the paper has 360"):
        get("coordinate-other-ais", folder, source=tmp_path)


def test_the_original_truthfulqa_is_cut_from_the_hubs_table(web, folder):
    site, _, _ = web
    (file,) = original_files("truthfulqa").values()
    path = site / "hub" / file.repository / "resolve" / file.revision / file.path
    path.parent.mkdir(parents=True)
    rows = [{"question": f"Q{i}?", "best_answer": "yes", "incorrect_answers": ["no"], "category": f"c{i % 4}"}
            for i in range(40)]  # fmt: skip
    pd.DataFrame(rows).to_parquet(path)
    get("truthfulqa", folder, original=True)
    pairs, categories = load_paper_questions("truthfulqa", folder)
    assert categories == tuple(f"c{i % 4}" for i in range(40))
    assert all(pair.options[pair.positive] == "yes" for pair in pairs)


def test_a_set_that_was_written_for_the_paper_has_no_original(folder):
    with pytest.raises(ValueError, match="'hallucination' was written for the paper and has no original"):
        get("hallucination", folder, original=True)


def test_an_unknown_name_is_refused_before_anything_is_fetched(web, folder):
    with pytest.raises(ValueError, match="got 'kindness', expected one of coordinate-other-ais"):
        get(["refusal", "kindness"], folder)
    assert web[2] == []
    assert not folder.exists()


def test_the_real_raw_files_split_into_the_published_sizes(folder):
    source = SHARED / "data" / "mwe"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/mwe beside the project")
    found = get((), folder, source=source)
    assert found[["name", "split", "pairs"]].values.tolist() == [
        ["myopic-reward", "generate", 950],
        ["myopic-reward", "test", 50],
        ["survival-instinct", "generate", 903],
        ["survival-instinct", "test", 50],
    ]
    assert (found["pairs"] == found["published"]).all()
    for name in ("myopic-reward", "survival-instinct"):
        with_duplicates = [json.loads(line) for line in (source / f"{name}.jsonl").read_text().splitlines()]
        rows = [json.loads(line) for split in ("generate", "test")
                for line in (folder / name / f"{split}.jsonl").read_text().splitlines()]  # fmt: skip
        assert len({row["question"] for row in rows}) == len(rows) == len(with_duplicates)
        assert {row["positive"] for row in rows} <= {f"({letter})" for letter in "ABCDEFGH"}


def test_the_authors_real_early_files_read_as_a_set(folder, tmp_path):
    source = SHARED / "data" / "caa"
    if not source.is_dir():
        pytest.skip("needs ../shared/data/caa beside the project")
    refusal = json.loads((source / "refusal_ab.json").read_text())
    sycophancy = json.loads((source / "sycophancy_generate.json").read_text())
    write_published(tmp_path, "refusal", generate=refusal[50:], test=refusal[:50])
    write_published(tmp_path, "sycophancy", generate=sycophancy[50:], test=sycophancy[:50])
    items = json.loads((source / "truthful_qa_ab_eval.json").read_text())
    questions = [{**item, "prompt": item["question"], "category": "any"} for item in items]
    write_published(tmp_path, "truthfulqa", questions=questions)
    with pytest.warns(PaperDataWarning) as told:
        found = get((), folder, source=tmp_path)
    assert any("refusal: generate has 368 questions, the paper has 408" in str(w.message) for w in told)
    pairs = found.set_index(["name", "split"])["pairs"]
    assert pairs["refusal", "test"] == 50
    assert pairs["sycophancy", "generate"] == 1030
    assert pairs["truthfulqa", "questions"] == 1634
