"""Data as people have them become the same pairs: tables, frames, data sets, preferences, whole prompts."""

import csv
import gzip
import json
import random
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caa_lens.contrast.errors import ContrastFileError, DroppedRowsWarning
from caa_lens.contrast.pair import ContrastPair
from caa_lens.contrast.sets import ContrastSet, LetterBalanceWarning, load_open_ended
from caa_lens.contrast.tables import csv_source
from caa_lens.results import Result

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TEXTS = [
    ("How was it?", "Marvellous, I smiled.", "Dreadful, I left."),
    ('Is "soup", in short,\ngood?', "Yes; warm, and lovely.", "No,\tcold."),
    ("Où étais-tu?", "NA", "None"),
    ("2 + 2?", "4 it is", "007"),
]
COLUMNS = ("question", "positive", "negative")
PAIRS = tuple(ContrastPair(question=q, positive=p, negative=n) for q, p, n in TEXTS)
FRAME = pd.DataFrame(TEXTS, columns=COLUMNS)
USER, BOT = "user", "assistant"


def rows(names=COLUMNS, **more):
    return [dict(zip(names, texts, strict=True)) | more for texts in TEXTS]


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def talk(*texts, first=USER):
    roles = (USER, BOT) if first == USER else (BOT, USER)
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def told(load, *given, **options):
    with pytest.raises(ContrastFileError) as error:
        load(*given, **options)
    return str(error.value)


# --- forms of files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".csv", "\t")])
def test_tables_of_text_give_the_very_texts_whatever_their_separator_and_encoding(
    tmp_path, ending, separator, encoding, packed
):
    data = FRAME.to_csv(index=False, sep=separator).encode(encoding)
    path = write(tmp_path / f"mine{ending}{'.gz' * packed}", gzip.compress(data) if packed else data)
    loaded = ContrastSet.load(path)
    assert loaded.pairs == PAIRS
    assert loaded.name == "mine"


# Whatever could be taken for structure of a table: separators, quotes, ends of lines, blanks at the ends.
cells = st.text(alphabet="ab1é ,;\t\"'\n\u2028#", min_size=1, max_size=14).filter(str.strip)
triples = st.lists(
    st.tuples(cells, cells, cells).filter(lambda t: t[1].strip() != t[2].strip()), min_size=1, max_size=6
)


@settings(deadline=None, derandomize=True)
@given(triples, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_texts_come_out_of_a_table_as_they_went_in(texts, separator, ends, quote_all):
    if quote_all:  # pandas does not quote a cell for a bare "\r" in it
        texts = [tuple(text.replace("é", "\r") + "." for text in three) for three in texts]
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    text = pd.DataFrame(texts, columns=COLUMNS).to_csv(index=False, sep=separator, lineterminator=ends, quoting=quoting)
    source = csv_source("a table", text, tabs=separator == "\t")
    assert [tuple(row.values()) for _, row in source.rows] == texts
    assert source.columns == COLUMNS
    if not quote_all:
        broken = [sum(cell.count("\n") for cell in three) for three in texts]
        assert [line for line, _ in source.rows] == [2 + n + sum(broken[:n]) for n in range(len(texts))]


def test_a_table_without_a_line_of_names_is_told_what_its_first_line_is_taken_for(tmp_path):
    path = write(tmp_path / "a.csv", "How was it?,Marvellous.,Dreadful.\n")
    message = told(ContrastSet.load, write(path, path.read_text() * 2))
    assert "found the columns How was it?, Marvellous., Dreadful. in its first line, expected a question" in message


def test_a_cell_that_pandas_would_take_for_a_missing_value_or_a_number_is_the_text_it_is(tmp_path):
    path = write(tmp_path / "a.csv", "question,positive,negative\nWhich?,null,NaN\nHow many?,1.0,1.00\n")
    assert [(p.positive, p.negative) for p in ContrastSet.load(path)] == [("null", "NaN"), ("1.0", "1.00")]


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "jsonl.gz"])
def test_every_other_form_of_a_file_gives_the_same_pairs(tmp_path, form):
    path = tmp_path / f"mine.{form}"
    if form == "parquet":
        FRAME.to_parquet(path)
    else:
        text = json.dumps(rows()) if form == "json" else "\n".join(map(json.dumps, rows()))
        write(path, gzip.compress(text.encode()) if form.endswith("gz") else text)
    assert ContrastSet.load(path).pairs == PAIRS


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        np.array(TEXTS),
        list(PAIRS),
        rows(),
        iter(rows()),
        FRAME,
        FRAME.set_index(pd.Index([7, 7, 7, 7])),
        pa.Table.from_pandas(FRAME),
        datasets.Dataset.from_list(rows(id=3)),
        datasets.Dataset.from_list(rows()).to_iterable_dataset(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_whatever_holds_rows_in_memory_gives_the_same_pairs(data):
    assert ContrastSet.from_pairs(data).pairs == PAIRS


def test_what_was_saved_is_read_back_exactly_even_where_it_looks_like_a_conversation(tmp_path):
    texts = ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", ' [{"role": "user"}]', "\n\nHuman: no")
    ContrastSet.from_pairs([texts]).save(tmp_path / "a.jsonl")
    (pair,) = ContrastSet.load(tmp_path / "a.jsonl")
    assert (pair.question, pair.positive, pair.negative) == texts


# --- columns


@pytest.mark.parametrize(
    "names",
    [
        ("Question", "Positive", "NEGATIVE"),
        (" question ", "positive", "negative"),
        ("prompt", "chosen", "rejected"),
        ("instruction", "Chosen", "Rejected"),
        ("question", "answer_matching_behavior", "answer not matching behavior"),
        ("prompt", "correct", "incorrect"),
    ],
)
def test_columns_are_known_by_their_names_whatever_case_and_blanks(tmp_path, names):
    frame = FRAME.set_axis(names, axis=1).assign(other="x")
    assert ContrastSet.from_pairs(frame).pairs == PAIRS
    frame.to_csv(tmp_path / "a.csv")
    assert ContrastSet.load(tmp_path / "a.csv").pairs == PAIRS


def test_columns_that_are_called_otherwise_are_named(tmp_path):
    names = {"question": "ask", "positive": "good", "negative": "bad one"}
    frame = FRAME.rename(columns=names)
    frame.to_csv(tmp_path / "a.csv", index=False)
    for load, data in ((ContrastSet.from_pairs, frame), (ContrastSet.load, tmp_path / "a.csv")):
        assert load(data, columns=names).pairs == PAIRS
        assert (
            "expected a question (question, prompt, instruction, input, conversations, messages) and the answers of"
            in told(load, data)
        )
        where = " in its first line" * (load == ContrastSet.load)
        assert f"found the columns ask, good, bad one{where}, expected" in told(load, data)
        assert "named with columns={'question': ..., 'positive': ..., 'negative': ...}" in told(load, data)
        assert "a column 'better', which columns= names for the positive" in told(
            load, data, columns=names | {"positive": "better"}
        )
    only = ContrastSet.from_pairs(FRAME.set_axis(["ask", "chosen", "rejected"], axis=1), columns={"question": "ask"})
    assert only.pairs == PAIRS


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"ask": "question", "good": "positive"}, ValueError, "here they are the other way round"),
        ({"positive": "a"}, ValueError, "names one of the two answers only"),
    ],
)
def test_a_mapping_of_columns_that_maps_nothing_is_refused(columns, error, message):
    with pytest.raises(error, match=message):
        ContrastSet.from_pairs(FRAME, columns=columns)


def test_a_column_that_stands_twice_and_answers_of_two_forms_are_refused(tmp_path):
    twice = pd.DataFrame([("q", "a", "b", "c")], columns=["question", "positive", "negative", "negative"])
    assert "negative: found 2 columns of that name" in told(ContrastSet.from_pairs, twice)
    path = write(tmp_path / "a.csv", "question,Positive,POSITIVE,negative\nq,a,b,c\n")
    assert "found 2 columns of that name ('Positive' and 'POSITIVE')" in told(ContrastSet.load, path)
    assert "answers of two forms" in told(
        ContrastSet.from_pairs, [{"question": "q", "chosen": "a", "rejected": "b", "correct": "c", "incorrect": "d"}]
    )
    path = write(tmp_path / "a.jsonl", '{"question": "q", "positive": "x", "negative": "y", "negative": "z"}')
    assert "line 1, negative: found the key twice in one object" in told(ContrastSet.load, path)
    other = write(tmp_path / "b.csv", "note,question,positive,negative,note\n1,q,a,b,2\n")
    assert len(ContrastSet.load(other)) == 1, "a column that is not used may stand twice"


# --- cells


@pytest.mark.parametrize("bad", [None, float("nan"), 3, 2.5, True, "", " \n", np.nan, pd.NA, b"bytes", ["a list"]])
def test_a_cell_that_is_no_text_is_told_with_its_row_and_column(bad):
    frame = pd.DataFrame([("q", "a", "b"), ("p", "c", bad)], columns=COLUMNS).astype(object)
    frame.iat[1, 2] = bad
    assert "DataFrame: row 2, negative: found " in told(ContrastSet.from_pairs, frame)
    assert "pairs: pair 2, negative: found " in told(ContrastSet.from_pairs, frame.to_dict("records"))


def test_a_row_of_a_csv_is_called_by_the_line_on_which_it_begins(tmp_path):
    text = 'question,positive,negative\n"one\n\ntwo",a,b\n\nlast,same,same\nshort,row\nlong,a,b,c\nempty ends,a,b,,\n'
    message = told(ContrastSet.load, write(tmp_path / "a.csv", text))
    assert "3 problems in 5 rows" in message
    assert "line 6, negative: found 'same', expected another answer" in message
    assert "line 7: found 2 cells, expected 3" in message
    assert "line 8: found 4 cells, expected 3" in message


def test_quotes_that_do_not_fit_are_no_guess(tmp_path):
    for text in ('q,a,"b" c\n', 'q,a,"never closed\nq,c,d\n'):
        message = told(ContrastSet.load, write(tmp_path / "a.csv", "question,positive,negative\n" + text))
        assert "quotes that do not fit" in message
        assert "in the row from line 2 on" in message


def test_a_long_cell_is_read_whole(tmp_path):
    long = "word " * 60_000
    path = write(tmp_path / "a.csv", f"question,positive,negative\nq,{long.strip()},b\n")
    assert ContrastSet.load(path)[0].positive == long.strip()


# --- files that are something else


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "question;positive\ncafé;x\n".encode("latin-1"), "path.read_text('cp1252'), 'utf-8')"),
        ("a.csv", "question,positive,negative\nq,a,b\n".encode("utf-16-le"), "text in UTF-16: save it as UTF-8"),
        ("a.xlsx", b"PK\3\4", "save it as CSV in UTF-8, or ContrastSet.from_pairs(pandas.read_excel(...))"),
        ("a.csv", "question,positive,negative\n", "found no rows, expected one pair at least"),
        ("a.parquet", b"PAR1 and no more", "a parquet table that cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "a damaged gzip file"),
        ("a.txt", "How was it?\n", "prompts are read by load_open_ended"),
        ("a.json", json.dumps({"data": rows()}), "json.loads(Path(...).read_text('utf-8'))['data']"),
        ("a.json", json.dumps({"data": rows()}, indent=2), "one object with 4 rows under 'data'"),
        ("a.json", FRAME.to_json(), "save it with to_json(..., orient='records')"),
    ],
)
def test_a_file_of_another_kind_is_told_with_what_to_write(tmp_path, name, content, expected):
    assert expected in told(ContrastSet.load, write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.csv.gz", "a.jsonl", "a.json"])
def test_a_damaged_file_is_read_or_refused_in_our_words(tmp_path, name):
    path, generator = tmp_path / name, random.Random(name)
    data = {
        "csv": FRAME.to_csv(index=False).encode(),
        "tsv": FRAME.to_csv(index=False, sep="\t").encode("utf-16"),
        "parquet": FRAME.to_parquet(),
        "jsonl": "\n".join(map(json.dumps, rows())).encode(),
        "json": json.dumps(rows(("prompt", "chosen", "rejected"))).encode(),
    }[name.split(".")[1]]
    data = gzip.compress(data) if name.endswith("gz") else data
    refused = []
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 1, 2, 5))):
            start = generator.randrange(len(damaged))
            change = generator.choice(("flip", "cut", "insert"))
            damaged[start : start + (change != "insert") * generator.choice((1, 4, 30))] = (
                b"" if change == "cut" else generator.randbytes(generator.choice((1, 3)))
            )
            damaged = damaged or bytearray(b"x")
        path.write_bytes(damaged)
        try:
            assert len(ContrastSet.load(path)) > 0
        except ContrastFileError as error:
            refused.append(str(error))
    assert len(refused) > 8
    assert all(str(path) in message and len(message) < 3000 and message.encode() for message in refused)


def test_what_to_write_for_rows_below_a_key_works(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"data": rows()}))
    assert ContrastSet.from_pairs(json.loads(path.read_text("utf-8"))["data"]).pairs == PAIRS


def test_a_json_list_of_triples_is_a_list_of_pairs(tmp_path):
    assert ContrastSet.load(write(tmp_path / "a.json", json.dumps(TEXTS))).pairs == PAIRS
    assert "item 2: found" in told(ContrastSet.load, write(tmp_path / "b.json", json.dumps([TEXTS[0], TEXTS[1][:2]])))


def test_one_pair_over_many_lines_is_one_row(tmp_path):
    assert ContrastSet.load(write(tmp_path / "a.json", json.dumps(rows()[0], indent=2))).pairs == PAIRS[:1]


def test_a_dataset_of_several_splits_and_a_saved_one_are_told(tmp_path):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(rows()), test=datasets.Dataset.from_list(rows()))
    with pytest.raises(TypeError, match=r"of the splits 'train', 'test': choose one, as in data\['train'\]"):
        ContrastSet.from_pairs(both)
    both.save_to_disk(tmp_path / "saved")
    assert "ContrastSet.from_pairs(datasets.load_from_disk(...))" in told(ContrastSet.load, tmp_path / "saved")


def test_the_papers_questions_are_named_where_they_are_meant():
    for name in ("mmlu", "TruthfulQA"):
        assert f"load_paper_questions({name.lower()!r})" in told(ContrastSet.load, name)


# --- preferences and whole texts


def test_messages_in_all_three_forms_give_question_and_answers(tmp_path):
    asked, good, bad = TEXTS[0]
    forms = [
        {"chosen": talk(asked, good), "rejected": talk(asked, bad)},
        {"prompt": asked, "chosen": talk(asked, good), "rejected": talk(asked, bad)},
        {"prompt": asked, "chosen": talk(good, first=BOT), "rejected": talk(bad, first=BOT)},
        {"prompt": talk(asked), "chosen": talk(good, first=BOT), "rejected": talk(bad, first=BOT)},
        {"prompt": talk(asked), "chosen": good, "rejected": bad},
        {"chosen": json.dumps(talk(asked, good)), "rejected": json.dumps(talk(asked, bad))},
        {
            side: [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
            for side, text in (("chosen", good), ("rejected", bad))
        },
        {side: f"\n\nHuman: {asked}\n\nAssistant: {text}" for side, text in (("chosen", good), ("rejected", bad))},
        {"prompt": f"\n\nHuman: {asked}\n\nAssistant:", "chosen": f" {good}", "rejected": f" {bad}"},
        {"positive": f"{asked} {good}", "negative": f"{asked} {bad}"},
        {"prompt": asked, "chosen": f"{asked} {good}", "rejected": f"{asked}\n{bad}"},
        {"input": asked, "chosen": good, "rejected": bad, "system": " "},
        {"instruction": asked, "input": "", "chosen": good, "rejected": bad, "history": []},
        {
            "conversations": [{"from": "human", "value": asked}],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        },
    ]
    for n, form in enumerate(forms):
        assert ContrastSet.from_pairs([form]).pairs == PAIRS[:1], form
        path = write(tmp_path / f"{n}.jsonl", json.dumps(form))
        assert ContrastSet.load(path).pairs == PAIRS[:1], form
        pd.DataFrame([form]).to_parquet(tmp_path / f"{n}.parquet")
        assert ContrastSet.load(tmp_path / f"{n}.parquet").pairs == PAIRS[:1], form
        assert ContrastSet.from_pairs(datasets.Dataset.from_list([form])).pairs == PAIRS[:1], form


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ("I think that it is good", "I think that it was bad", ("I think that it", "is good", "was bad")),
        ("She is happy", "She is happiness", ("She is", "happy", "happiness")),
        ("Say: yes", "Say: yes, no", ("Say:", "yes", "yes, no")),
        ("Q?\nA: it", "Q?\nB: it", ("Q?", "A: it", "B: it")),
    ],
)
def test_whole_prompts_are_cut_at_a_blank_and_never_in_a_word(positive, negative, expected):
    (pair,) = ContrastSet.from_pairs([{"positive": positive, "negative": negative}])
    assert (pair.question, pair.positive, pair.negative) == expected
    assert positive.split() == [*pair.question.split(), *pair.positive.split()]


def test_transcripts_are_cut_between_turns_though_the_answers_begin_alike():
    sides = [f"\n\nHuman: Why?\n\nAssistant: Because it {verb} so" for verb in ("is", "was")]
    (pair,) = ContrastSet.from_pairs([{"chosen": sides[0], "rejected": sides[1]}])
    assert (pair.question, pair.positive, pair.negative) == ("Why?", "Because it is so", "Because it was so")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "history": ["p", "x"]},
            r'history: found \["p", "x"\], expected a list of \[question, answer\]; or give the question as a list',
        ),
        (
            {side: [*talk("q", "x"), {"role": BOT, "content": side}] for side in ("chosen", "rejected")},
            r"chosen: found messages of user, assistant: the assistant's last, expected what is answered at the end",
        ),
        (
            {"prompt": [{"role": "narrator", "content": "q"}], "chosen": "the a", "rejected": "the b"},
            "prompt: found the role 'narrator' in message 1, expected one of system, developer, user, assistant, tool",
        ),
        (
            {"prompt": [{"role": USER, "content": [{"type": "image"}]}], "chosen": "the a", "rejected": "the b"},
            r"prompt: found a message with a list of parts \(image\), expected its words in one text",
        ),
        (
            {"prompt": [{**talk("q")[0], "tool_calls": [{"id": 1}]}], "chosen": "the a", "rejected": "the b"},
            "prompt: found a message with 'tool_calls', expected .* without it: it would be lost",
        ),
        ({"chosen": talk("q", "a"), "rejected": talk("q", "a")}, "found the same conversation twice"),
        ({"chosen": talk("q", "a"), "rejected": talk("p", "b")}, r"differ in more than the last answer \(behind 0"),
        ({"chosen": talk("q", "a", "c"), "rejected": talk("q", "b")}, "differ in more than the last answer"),
        ({"chosen": talk("q", "a"), "rejected": "b"}, "rejected: found .* expected a conversation, as the other"),
        (
            {"prompt": "other", "chosen": talk("q", "a"), "rejected": talk("q", "b")},
            "prompt: found .*expected the same",
        ),
        ({"prompt": None, "chosen": "the a", "rejected": "the b"}, "prompt: found null, expected text"),
        ({"chosen": [{"text": "x"}], "rejected": talk("q", "b")}, "found a message .* of a role and a text"),
        ({"chosen": "[{'role': 'user', 'content': 'q'}]", "rejected": "x"}, "in Python's notation"),
        ({"positive": "I am happy", "negative": "You are sad"}, "found whole texts that begin differently"),
        ({"positive": "unhappy", "negative": "unkind"}, "found whole texts that begin differently"),
    ],
)
def test_what_is_no_question_with_two_answers_is_told(row, message):
    with pytest.raises(ContrastFileError, match=message):
        ContrastSet.from_pairs([row])


def test_what_an_input_adds_to_an_instruction_is_in_the_question():
    row = {"instruction": "Translate.", "input": "Wie geht's?", "chosen": "How are you?", "rejected": "How goes it?"}
    assert ContrastSet.from_pairs([row])[0].question == "Translate.\nWie geht's?"
    (only,) = ContrastSet.from_pairs([row], columns={"question": "instruction"})
    assert only.question == "Translate."


def test_an_answer_that_is_json_and_no_conversation_is_an_answer():
    row = {"prompt": "Call it", "chosen": '[{"name": "a"}]', "rejected": '[{"name": "b"}]'}
    assert ContrastSet.from_pairs([row])[0].positive == row["chosen"]


def test_an_empty_system_message_is_none():
    row = {"system": "", "question": "q", "chosen": "a", "rejected": "b"}
    assert ContrastSet.from_pairs([row])[0].question == "q"


# --- bad rows


def bad_file(tmp_path, n_good=6):
    lines = [json.dumps({"question": f"Is {n} it?", "positive": f"good {n}", "negative": f"bad {n}"}) for n in range(9)]
    lines = lines[:n_good]
    lines[1:1] = [json.dumps({"question": "q", "positive": "x", "negative": None}), "{broken", '{"question": "q"}']
    return write(tmp_path / "some.jsonl", "\n".join(lines))


def test_bad_rows_are_left_out_where_that_is_asked_and_told_with_number_place_and_reason(tmp_path):
    path = bad_file(tmp_path)
    assert "3 problems in 9 rows; on_bad='drop' leaves such rows out" in told(ContrastSet.load, path)
    with pytest.warns(DroppedRowsWarning) as said:
        loaded = ContrastSet.load(path, on_bad="drop")
    assert [pair.question for pair in loaded] == [f"Is {n} it?" for n in range(6)]
    message = str(said[0].message)
    assert "some.jsonl: 3 of 9 rows are no pairs and were left out" in message
    assert "line 2, negative: found null, expected text" in message
    assert "line 3: found what is not JSON" in message
    assert loaded.dropped == 3
    assert loaded.split(test=2)[0].dropped == 3
    assert loaded.check().provenance["pairs"].details["dropped_rows"] == "3"


def test_reasons_are_grouped_and_the_first_rows_of_each_are_named(tmp_path):
    frame = pd.DataFrame([("q", "a", "b")] * 4 + [("q", "a", None)] * 9 + [("q", "s", "s")] * 2, columns=COLUMNS)
    with pytest.warns(DroppedRowsWarning) as said:
        kept = ContrastSet.from_pairs(frame, on_bad="drop")
    assert len(kept) == 4
    head, first, second = str(said[0].message).split("\n  ")
    assert head == "DataFrame: 11 of 15 rows are no pairs and were left out"
    assert first.startswith("rows 5, 6, 7, 8, 9 and 4 more, negative: found ")
    assert second.startswith("rows 14, 15, negative: found 's', expected another answer")


def test_nothing_is_said_where_nothing_is_dropped_and_all_rows_bad_is_an_error(tmp_path):
    assert ContrastSet.from_pairs(FRAME, on_bad="drop").dropped == 0  # warnings are errors here
    assert "3 problems in 3 rows\n" in told(ContrastSet.load, bad_file(tmp_path, n_good=0), on_bad="drop")


def test_a_stray_kind_is_dropped_even_where_it_comes_first():
    options = "Which?\n (A) This\n (B) That"
    given = [("q", "a word", "another"), *[(options, *letters) for letters in [("(A)", "(B)"), ("(B)", "(A)")] * 3]]
    with pytest.warns(DroppedRowsWarning, match="expected an option letter, as in most rows"):
        kept = ContrastSet.from_pairs(given, on_bad="drop")
    assert (kept.kind, len(kept)) == ("ab", 6)
    with pytest.warns(DroppedRowsWarning, match=r"pair 2: found \(1, 2\), expected \(question, positive, negative\)"):
        assert len(ContrastSet.from_pairs([("q", "a", "b"), (1, 2)], on_bad="drop")) == 1


@pytest.mark.parametrize(
    ("file", "n_rows", "n_bad"),
    [("coordinate-itself", 1000, 2), ("self-awareness-training-nn-architecture", 998, 35)],
)
def test_public_files_with_a_few_bad_rows_are_read_without_them(file, n_rows, n_bad):
    path = SHARED / "mwe" / "lm_generated" / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: public test data is kept beside the project, not in it")
    assert f"{n_bad} problems in {n_rows} rows" in told(ContrastSet.load, path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = ContrastSet.load(path, on_bad="drop")
    assert (len(loaded), loaded.dropped) == (n_rows - n_bad, n_bad)
    assert f"{n_bad} of {n_rows} rows are no pairs" in str(said[0].message)
    # An independent count of rows whose two options are one text, or nothing.
    raw = [json.loads(line)["question"] for line in path.read_text("utf-8").splitlines()]
    options = [[part.strip() for part in text.split("(A)")[-1].split("\n (B)")[:2]] for text in raw]
    assert sum(len(two) < 2 or two[0] == two[1] or "" in two for two in options) == n_bad


def test_a_public_file_is_the_same_pairs_in_every_form(tmp_path):
    path = SHARED / "mwe" / "myopic-reward.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there: public test data is kept beside the project, not in it")
    loaded, frame = ContrastSet.load(path), pd.read_json(path, lines=True)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.parquet"):
        assert ContrastSet.load(tmp_path / name).pairs == loaded.pairs
    assert ContrastSet.from_pairs(datasets.Dataset.from_pandas(frame)).pairs == loaded.pairs


# --- open-ended prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffHow are you?\r\n\r\n  And now?  \n"),
        ("a.json", '["How are you?", "And now?"]'),
        ("a.jsonl", '"How are you?"\n"And now?"\n'),
        ("a.csv", "prompt,id\nHow are you?,1\nAnd now?,2\n"),
        ("a.json", '[{"prompt": "How are you?"}, {"prompt": "And now?"}]'),
        ("a.csv", 'Instruction,input\nHow are you?,\n"And now?",  \n'),
    ],
)
def test_open_ended_prompts_are_lines_texts_or_questions(tmp_path, name, content):
    assert [text.strip() for text in load_open_ended(write(tmp_path / name, content))] == ["How are you?", "And now?"]


def test_uneven_letters_are_told_of_data_in_memory_and_a_check_is_a_result(tmp_path):
    options = "Which of {}?\n (A) This\n (B) That"
    with pytest.warns(LetterBalanceWarning):
        pairs = ContrastSet.from_pairs([(options.format(n), "(A)", "(B)") for n in range(12)])
    assert isinstance(pairs.check(), Result)


TURNS = ({"role": "system", "content": "Be kind."}, *talk("a", "b", "c"))


@pytest.mark.parametrize(
    "row",
    [
        {"question": list(TURNS), "positive": "yes", "negative": "no"},
        {"prompt": list(TURNS), "chosen": "yes", "rejected": "no"},
        {"chosen": [*TURNS, *talk("yes", first=BOT)], "rejected": [*TURNS, *talk("no", first=BOT)]},
        {"prompt": "c", "chosen": [*TURNS, *talk("yes", first=BOT)], "rejected": [*TURNS, *talk("no", first=BOT)]},
        {"system": "Be kind.", "prompt": "c", "history": [["a", "b"]], "chosen": "yes", "rejected": "no"},
        {"system": "Be kind.", "prompt": talk("a", "b", "c"), "chosen": "yes", "rejected": "no"},
        {"question": json.dumps(TURNS), "positive": "yes", "negative": "no"},
        {
            "conversations": [{"from": "system", "value": "Be kind."}]
            + [{"from": who, "value": text} for who, text in (("human", "a"), ("gpt", "b"), ("human", "c"))],
            "chosen": "yes",
            "rejected": "no",
        },
    ],
)
def test_what_was_said_before_the_question_is_a_conversation(row, tmp_path):
    expected = ContrastPair(question=list(TURNS), positive="yes", negative="no")
    assert expected.question.to_list() == list(TURNS)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    for found in (ContrastSet.from_pairs([row]), ContrastSet.load(tmp_path / "a.jsonl")):
        assert found.pairs == (expected,)


def test_a_transcript_of_several_turns_is_a_conversation():
    both = {side: f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: {side}" for side in ("chosen", "rejected")}
    (pair,) = ContrastSet.from_pairs([both])
    assert pair.question.to_list() == talk("a", "b", "c")
    assert (pair.positive, pair.negative) == ("chosen", "rejected")


def test_conversations_are_saved_and_read_back_and_stand_in_the_frame_as_json(tmp_path):
    said = ContrastSet.from_pairs([(list(TURNS), "yes", "no"), ("a text", "yes", "no"), (talk("alone"), "yes", "no")])
    assert [pair.question for pair in said][1:] == ["a text", "alone"]
    said.save(tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["question"] == list(TURNS)
    said.frame.to_csv(tmp_path / "a.csv", index=False)
    said.frame.to_parquet(tmp_path / "a.parquet")
    for again in (
        *(ContrastSet.load(tmp_path / f"a.{ending}") for ending in ("jsonl", "csv", "parquet")),
        ContrastSet.from_pairs(said.frame),
        ContrastSet.from_pairs(said),
    ):
        assert again.pairs == said.pairs
        assert again.content_hash == said.content_hash
        assert again.pair_hashes == said.pair_hashes


def test_open_ended_prompts_may_be_conversations(tmp_path):
    from caa_lens.contrast.sets import load_open_ended

    rows = ["a text", list(TURNS), {"prompt": list(TURNS)}, {"question": "another"}, {"messages": talk("alone")}]
    (tmp_path / "a.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    assert [str(one) for one in load_open_ended(tmp_path / "a.json")] == [
        "a text",
        "system: Be kind.\n\nuser: a\n\nassistant: b\n\nuser: c",
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[2:3])), encoding="utf-8")
    assert load_open_ended(tmp_path / "b.jsonl")[0].to_list() == list(TURNS)
    (tmp_path / "c.jsonl").write_text(json.dumps(rows[4]), encoding="utf-8")
    assert load_open_ended(tmp_path / "c.jsonl") == ["alone"]
    (tmp_path / "d.json").write_text(json.dumps(list(TURNS)), encoding="utf-8")
    with pytest.raises(ContrastFileError, match="found a message alone, expected a list of prompts"):
        load_open_ended(tmp_path / "d.json")
