"""Results: what is saved comes back as it was, or is refused before anything is written; every kind shows itself."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.io
import pytest
import torch

from caa_lens.measures.open_ended.judging import Judgements
from caa_lens.measures.sweeps import Sweep
from caa_lens.provenance import Provenance
from caa_lens.results import Result, check_result_path
from caa_lens.transfers.across_behaviors import TransferGrid
from caa_lens.transfers.across_layers import LayerTransfer
from caa_lens.transfers.across_models import ModelTransfer
from caa_lens.transfers.residual_map import ResidualMap

NAN, INF = float("nan"), float("inf")
ODD = 'é \\ " \n\t\0 <b>&amp;</b> \u202e 🙂'  # to JSON, to a file's encoding, and to HTML
FROM = Provenance(model="owner/name", behavior=ODD, n_pairs=7, details={"pair_hashes": "a b", ODD: ""})
SETTINGS = {"model": "tiny", "test": "pairs", ODD: ODD, "": ""}


def rows(**columns) -> pd.DataFrame:
    """Every combination of the columns' values, with a random number each."""
    index = pd.MultiIndex.from_product(columns.values(), names=columns)
    value = np.random.default_rng(0).standard_normal(len(index))
    return index.to_frame(index=False).assign(value=value, cosine=value / 9, norm=np.float32(1.5))


def made_up() -> dict[str, Result]:
    """A result of every kind."""
    about = {"settings": SETTINGS, "provenance": {"vectors": FROM}}
    pairs = {"source": [1, 3], "target": [1, 3], "question": [0, 1]}
    by_name = {**pairs, "source": ["joy", ODD], "target": ["joy", "calm"]}
    of_models = {"vectors": ["own", "foreign"], "layer": [1, 3], "multiplier": [-1.0, 1.0], "question": [0, 1]}
    r2 = {"layer": [0, 1], "source_layer": [1, 3], "r2": [0.1, NAN], "r2_weighted": [0.3, -INF], "n_held_out": [7, 7]}
    answers = {"question": ["q", "r"], "answer": [ODD, ""], "score": [7.5, NAN], "raw": ["7.5", None]}
    return {
        "Sweep": Sweep(
            frame=rows(behavior=["b"], layer=[1, 3], multiplier=[-1.0, 0.0, 1.0], question=[0, 1]).rename(
                columns={"value": "margin"}
            ),
            metric="margin",
            **about,
        ),
        "LayerTransfer": LayerTransfer(
            frame=rows(**pairs).rename(columns={"value": "effect"}), metric="p_matching", unsteered=NAN, **about
        ),
        "TransferGrid": TransferGrid(
            frame=rows(**by_name).rename(columns={"value": "effect"}),
            settings=SETTINGS,
            provenance={"joy": FROM, ODD: Provenance()},
            layer=3,
            unsteered={"joy": 0.1, "calm": -INF},
            tests={"joy": SETTINGS, "calm": {}},
        ),
        "ModelTransfer": ModelTransfer(
            frame=rows(behavior=["b"], **of_models).assign(score=0.5).rename(columns={"value": "effect"}),
            provenance={"own": FROM, "foreign": Provenance(model="other")},
            metric="margin",
            unsteered=0.1 + 0.2,
            d_model=32,
        ),
        "ResidualMap": ResidualMap(
            frame=pd.DataFrame(r2),
            provenance={"source": FROM, "target": Provenance(model="wide")},
            weights=torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).mT,
            layers=(0, 1),
            source_layers=(1, 3),
        ),
        "Judgements": Judgements(
            frame=pd.DataFrame({**answers, "attempts": [1, 5], "error": ["", ODD], "multiplier": [-1.0, 1.0]}),
            settings={"rubric": ODD, "temperature": "0"},
            behavior=ODD,
            judge="m",
            path=Path("runs") / "judged.jsonl",
        ),
    }


KINDS = list(made_up())


@pytest.fixture(params=KINDS)
def result(request) -> Result:
    return made_up()[request.param]


@pytest.fixture
def sweep() -> Result:
    return made_up()["Sweep"]


def same(one: object, other: object) -> bool:
    """Equal in value and type, NaN with NaN."""
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        return all(one[name].dtype == other[name].dtype for name in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_json(path: Path, change) -> None:
    about = json.loads(path.read_text(encoding="utf-8"))
    change(about)
    path.write_text(json.dumps(about), encoding="utf-8")


# ---- round trips --------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_as_it_was(result, tmp_path):
    path = result.save(tmp_path / "new" / "r.parquet")
    back = type(result).load(str(path))
    for field in fields(result):
        assert same(getattr(result, field.name), getattr(back, field.name)), field.name
    assert repr(back) == repr(result)
    first = files_in(path.parent)
    assert set(first) == {"r.parquet", "r.json"} | ({"r.safetensors"} if isinstance(result, ResidualMap) else set())
    back.save(path)
    assert files_in(path.parent) == first, "saved again, the files are the same"


def test_every_kind_of_column_that_is_taken_comes_back_to_the_bit(sweep, tmp_path):
    frame = pd.DataFrame(
        {
            "float": [NAN, INF, -0.0],
            "small": np.array([1e-45, -INF, NAN], dtype=np.float32),
            "int": np.array([2**63 - 1, -(2**63), 0]),
            "byte": np.array([0, 255, 7], dtype=np.uint8),
            "bool": [True, False, True],
            "text": [ODD, "", None],
            ODD: ["nan", "None", "1"],
        }
    )
    back = Sweep.load(replace(sweep, frame=frame).save(tmp_path / "r.parquet")).frame
    assert same(frame, back)
    assert np.signbit(back["float"][2])
    empty = frame[:0]
    assert same(empty, Sweep.load(replace(sweep, frame=empty).save(tmp_path / "r.parquet")).frame)


def test_saving_over_an_earlier_result_leaves_only_the_new_one(result, sweep, tmp_path):
    path = sweep.save(tmp_path / "r.parquet")
    result.save(path)
    assert repr(type(result).load(path)) == repr(result)
    result.save(path)
    assert not [name for name in files_in(tmp_path) if name.startswith(".")], "no temporary file is left"


# ---- nothing is written that would not come back --------------------------------------------------------------------

ONE = pd.DataFrame({"a": [1, 2, 3]})
CANNOT_BE_HELD = {
    "complex": pd.DataFrame({"a": [1j]}),
    "lists": pd.DataFrame({"a": [[1, 2], [3]]}),
    "mixed": pd.DataFrame({"a": [1, "x"]}),
    "objects": pd.DataFrame({"a": [object()]}),
    "huge": pd.DataFrame({"a": pd.Series([2**70], dtype=object)}),
    "half a surrogate": pd.DataFrame({"a": pd.Series(["\ud83d"], dtype=object)}),
    "numbers as columns": pd.DataFrame({1: [2]}),
    "equal columns": pd.DataFrame([[1, 2]], columns=["a", "a"]),
    "no columns": pd.DataFrame(),
    "an index": ONE[1:],
    "a named index": ONE.rename_axis("pair"),
}


@pytest.mark.parametrize("frame", CANNOT_BE_HELD.values(), ids=CANNOT_BE_HELD)
def test_a_frame_that_parquet_cannot_hold_is_refused_with_nothing_on_disk(sweep, tmp_path, frame):
    message = r"this frame would not be read back as it is \(.+\): keep to numbers and texts"
    with pytest.raises(ValueError, match=message) as caught:
        replace(sweep, frame=frame).save(tmp_path / "r.parquet")
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == {}


def test_attributes_of_a_frame_that_json_does_not_hold_are_refused(sweep, tmp_path):
    for odd in ({"a": object()}, {1: "a"}, {"a": (1,)}):
        frame = ONE.copy()
        frame.attrs = odd
        with pytest.raises(ValueError, match="this frame would not be read back as it is"):
            replace(sweep, frame=frame).save(tmp_path / "r.parquet")
    assert files_in(tmp_path) == {}
    frame.attrs = {"a": [1, {"b": None}]}
    assert Sweep.load(replace(sweep, frame=frame).save(tmp_path / "r.parquet")).frame.attrs == frame.attrs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"a": 1}}, "settings cannot be saved, expected .*Mapping"),
        ({"settings": {"a": "\ud83d"}}, "a text of this result is not valid Unicode"),
        ({"provenance": {"vectors": "a"}}, "provenance cannot be saved"),
        ({"metric": 5}, "metric cannot be saved, expected str"),
    ],
)
def test_parts_that_are_not_what_they_are_said_to_be_are_refused(sweep, tmp_path, change, message):
    for name, value in change.items():  # past the dataclass, which is checked in tests
        object.__setattr__(sweep, name, value)
    with pytest.raises(ValueError, match=message):
        sweep.save(tmp_path / "r.parquet")
    assert files_in(tmp_path) == {}


def test_another_ending_is_refused(sweep, tmp_path):
    for name in ("r.json", "r", "r.csv", "r.PARQUET"):
        for refused in (sweep.save, Sweep.load, check_result_path):
            with pytest.raises(ValueError, match=f"results are saved as .parquet, got '{name}'"):
                refused(tmp_path / name)


def test_a_file_that_is_no_results_is_never_written_over(sweep, tmp_path):
    """`mine.json` may be somebody's pairs, and `mine.safetensors` somebody's vectors."""
    pairs, vectors = tmp_path / "mine.json", tmp_path / "mine.safetensors"
    for text in ("[]", "{}", '{"question": "q"}\n{"question": "r"}', "", "\xff"):
        pairs.write_text(text, encoding="latin-1")
        for refused in (sweep.save, check_result_path):
            with pytest.raises(
                ValueError,
                match=r"mine\.json was not written by a result's save, and stays as it is",
            ):
                refused(tmp_path / "mine.parquet")
        assert list(files_in(tmp_path)) == ["mine.json"]
    pairs.unlink()
    vectors.write_bytes(b"vectors")
    with pytest.raises(ValueError, match=r"mine\.safetensors was not written by a result's save"):
        made_up()["ResidualMap"].save(tmp_path / "mine.parquet")
    assert files_in(tmp_path) == {"mine.safetensors": b"vectors"}
    sweep.save(tmp_path / "mine.parquet")  # has no tensors to save
    with pytest.raises(ValueError, match=r"mine\.safetensors was not written"):
        made_up()["ResidualMap"].save(tmp_path / "mine.parquet")
    assert vectors.read_bytes() == b"vectors"
    assert Sweep.load(tmp_path / "mine.parquet").metric == "margin"


def test_a_frame_that_somebody_saved_is_never_written_over(result, tmp_path):
    path = tmp_path / "mine.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(path)
    before = files_in(tmp_path)
    with pytest.raises(ValueError, match=r"mine\.parquet was not written by a result's save, and stays as it is"):
        result.save(path)
    assert files_in(tmp_path) == before


def test_where_no_file_can_be_made_nothing_is(sweep, tmp_path):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"r\.json cannot be written: there is a folder of that name"):
        sweep.save(tmp_path / "r.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_write_that_breaks_off_is_never_read_as_a_result(sweep, tmp_path, monkeypatch):
    path = sweep.save(tmp_path / "r.parquet")
    more = replace(sweep, frame=pd.concat([sweep.frame, sweep.frame], ignore_index=True))
    write = Path.write_bytes

    def full(file, data):
        if file.suffix == ".parquet":
            raise OSError("no space left")
        return write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            more.save(path)
    with pytest.raises(ValueError, match=r"r\.parquet is not the one it was written with, or damaged"):
        Sweep.load(path)
    more.save(path)
    assert len(Sweep.load(path).frame) == len(more.frame)


# ---- files that are not what was saved ----------------------------------------------------------------------------


def test_each_of_the_files_is_missed(result, tmp_path):
    path = result.save(tmp_path / "r.parquet")
    for name, data in files_in(tmp_path).items():
        (tmp_path / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=rf"no file .*{name}: a saved {type(result).__name__} is r\.parquet"
        ):
            type(result).load(path)
        (tmp_path / name).write_bytes(data)


def test_another_kind_is_named(result, tmp_path):
    path = result.save(tmp_path / "r.parquet")
    kind = type(result).__name__
    other = LayerTransfer if kind == "Sweep" else Sweep
    with pytest.raises(ValueError, match=rf"holds a {kind}, expected a {other.__name__}: {kind}\.load reads it"):
        other.load(path)


def test_a_changed_byte_of_the_frame_or_the_tensors_is_found(result, tmp_path):
    path = result.save(tmp_path / "r.parquet")
    before = files_in(tmp_path)
    for name in set(before) - {"r.json"}:
        for damaged in (b"", before[name][:-1], before[name] + b" ", b"x" + before[name][1:], b"\0" * 99):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{name} is not the one it was written with, or damaged"):
                type(result).load(path)
        (tmp_path / name).write_bytes(before[name])
    type(result).load(path)


def test_files_of_two_results_do_not_go_together(sweep, tmp_path):
    sweep.save(tmp_path / "a.parquet")
    replace(sweep, frame=sweep.frame[:3]).save(tmp_path / "b.parquet")
    (tmp_path / "a.json").rename(tmp_path / "c.json")
    (tmp_path / "b.json").rename(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.parquet is not the one it was written with"):
        Sweep.load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"null nul", b"[" * 100_000, b'{"a":' * 100_000],
    ids=["empty", "cut off", "no text", "words", "deep lists", "deep objects"],
)
def test_damaged_json_is_said_to_be(sweep, tmp_path, data):
    path = sweep.save(tmp_path / "r.parquet")
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"r\.json is not readable JSON \(.+\): delete it and save the result again"):
        Sweep.load(path)


@pytest.mark.parametrize("data", [b"null", b"[]", b"3", b'"caa_lens_result"', b"{}", b'{"kind": "Sweep"}'])
def test_json_that_no_result_wrote_is_said_to_be(sweep, tmp_path, data):
    path = sweep.save(tmp_path / "r.parquet")
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"r\.json was not written by a result's save"):
        Sweep.load(path)


def test_a_text_or_number_changed_in_the_json_is_found(result, tmp_path):
    path = result.save(tmp_path / "r.parquet")
    wrong = [lambda about: about["settings"].update(model="another"), lambda about: about.pop("checksum")]
    special = json.loads((tmp_path / "r.json").read_text())["special"]
    for name in [name for name, value in special.items() if type(value) in (int, float) and abs(value) < 1e9]:
        wrong.append(lambda about, name=name: about["special"].update({name: special[name] + 1}))
    for change in wrong:
        result.save(path)
        edit_json(tmp_path / "r.json", change)
        with pytest.raises(
            ValueError, match=r"r\.json is damaged, or was edited: its checksum is not that of its contents"
        ):
            type(result).load(path)


def test_a_newer_format_asks_for_a_newer_library(sweep, tmp_path):
    path = sweep.save(tmp_path / "r.parquet")
    edit_json(tmp_path / "r.json", lambda about: about.update(caa_lens_result=2))
    with pytest.raises(ValueError, match=r"has format 2, this version reads 1: update caa_lens"):
        Sweep.load(path)


@pytest.mark.parametrize("key", ["sha256", "settings", "provenance", "special"])
@pytest.mark.parametrize("value", ["missing", None, [], 3, "text", {"a": 1}, [[]], {"metric": 5}, {".parquet": None}])
def test_json_whose_parts_are_missing_or_of_another_kind_is_said_to_be(sweep, tmp_path, key, value):
    path = sweep.save(tmp_path / "r.parquet")
    edit_json(tmp_path / "r.json", lambda about: about.pop(key) if value == "missing" else about.update({key: value}))
    with pytest.raises(ValueError, match=r"r\.json is not what a Sweep is saved with: ") as caught:
        Sweep.load(path)
    assert "\n" not in str(caught.value)


def test_deep_and_foreign_parts_of_provenance_are_refused(sweep, tmp_path):
    path = sweep.save(tmp_path / "r.parquet")
    deep: list = []
    for _ in range(400):
        deep = [deep]
    for wrong in (3, [], {"model": 3}, {"details": {"a": 1}}, {"n_pairs": "7"}, deep):
        edit_json(tmp_path / "r.json", lambda about, wrong=wrong: about["provenance"].update(vectors=wrong))
        with pytest.raises(ValueError, match="is not what a Sweep is saved with"):
            Sweep.load(path)


def test_junk_under_the_right_checksum_is_no_frame_and_no_weights(tmp_path):
    import hashlib

    result = made_up()["ResidualMap"]
    for name in ("r.parquet", "r.safetensors"):
        path = result.save(tmp_path / "r.parquet")
        (tmp_path / name).write_bytes(b"PAR1 junk, which is neither")
        sha = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        ending = Path(name).suffix
        edit_json(tmp_path / "r.json", lambda about, e=ending, s=sha: about["sha256"].update({e: s}))
        with pytest.raises(ValueError, match="is not what a ResidualMap is saved with"):
            ResidualMap.load(path)


# ---- what is shown ------------------------------------------------------------------------------------------------


def test_jupyter_shows_the_figure(result, monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    shown = result._repr_mimebundle_(None, None)
    drawn = shown["application/vnd.plotly.v1+json"]
    assert drawn["data"]
    assert drawn["layout"]["title"]["text"]


def test_every_result_has_a_summary_and_a_table_of_it_where_there_are_two_axes(result):
    assert isinstance(result.summary(), pd.DataFrame)
    assert len(result.summary())
    if hasattr(result, "table"):
        assert result.table().notna().all(axis=None)


def test_texts_of_others_are_escaped_in_the_figures(result):
    assert "<b>" not in result.plot().layout.title.text


def test_a_result_that_says_nothing_of_itself_has_neither():
    bare = Result(frame=ONE)
    for missing in (bare.summary, bare.plot):
        with pytest.raises(NotImplementedError):
            missing()


def test_plain_fields_of_any_kind_round_trip_by_their_annotations(tmp_path):
    from collections.abc import Mapping

    @dataclass(frozen=True, slots=True, kw_only=True, eq=False)
    class Odd(Result):
        number: float
        whole: int
        maybe: int | None
        pairs: tuple[tuple[str, int], ...]
        by_name: Mapping[str, Provenance]
        where: Path

    odd = Odd(
        frame=ONE, number=1, whole=10**30, maybe=None, pairs=((ODD, 1),), by_name={ODD: FROM}, where=Path("a") / "b"
    )
    back = Odd.load(odd.save(tmp_path / "r.parquet"))
    for name in ("number", "whole", "maybe", "pairs", "by_name", "where"):
        assert getattr(back, name) == getattr(odd, name), name


# ---- judgements ---------------------------------------------------------------------------------------------------


def test_judgements_are_averaged_over_what_has_a_score_by_columns_of_choice():
    frame = pd.DataFrame(
        {
            "question": "q",
            "answer": "a",
            "multiplier": [1.0, 1.0, -1.0, -1.0, 1.0],
            "score": [8.0, 6.0, 1.0, NAN, NAN],
        }
    )
    judged = replace(made_up()["Judgements"], frame=frame)
    (every,) = judged.summary().to_dict("records")
    assert (every["n"], every["failed"], every["mean"]) == (5, 2, 5.0)
    assert 1 <= every["low"] < 5 < every["high"] <= 8
    table = judged.summary(by=["multiplier"])
    assert table[["multiplier", "n", "failed", "mean"]].to_numpy().tolist() == [[1, 3, 1, 7], [-1, 2, 1, 1]]
    assert np.isnan(table["low"][1]), "one score has no interval"
    pd.testing.assert_frame_equal(judged.summary(by="multiplier"), table)
    with pytest.raises(ValueError, match="no column 'layer': expected some of question, answer, multiplier, score"):
        judged.summary(by=["layer"])
    none = replace(judged, frame=frame.assign(score=NAN))
    assert none.summary()["failed"].tolist() == [5]
    assert list(judged.plot().data[0].x) == [8, 6, 1]
    title = judged.plot().layout.title.text.replace("<br>", " ")  # which wraps
    assert "3 answers by judge m, 2 without a score" in title
