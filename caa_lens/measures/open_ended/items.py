"""Open-ended questions with a model's answers, as one frame: what is judged and measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from caa_lens.contrast.messages import Conversation, as_question, is_messages

COLUMNS = ["question", "answer"]


def answers_frame(items: Any, *, adds: Sequence[str] = ()) -> pd.DataFrame:
    """A copy with `question` (or messages, as a `Conversation`) and `answer`; other columns, order and index stay.

    Args:
        items: a frame, or an iterable of dicts or of (question, answer) pairs.
        adds: columns that the caller is about to add.

    Raises:
        TypeError: for something else, or a question or an answer that is not text (a missing one included).
        ValueError: for no items, a missing or repeated column, one that is to be added, or text that is not Unicode.
    """
    if isinstance(items, pd.DataFrame):
        frame = items.copy()
    elif isinstance(items, str | Mapping) or not isinstance(items, Iterable):
        raise TypeError(
            f"got {type(items).__name__}, expected a frame with the columns question and answer, "
            "or a list of (question, answer) pairs"
        )
    else:
        rows = list(items)
        pairs = all(isinstance(row, tuple | list) and len(row) == 2 for row in rows)
        if not pairs and not all(isinstance(row, Mapping) for row in rows):
            raise TypeError("expected (question, answer) pairs, or dicts with question and answer, in every row")
        try:
            frame = pd.DataFrame(rows, columns=COLUMNS if pairs else None)
        except UnicodeEncodeError as error:
            raise ValueError(f"a text is not valid Unicode: {error}") from None
    if len(frame) == 0:
        raise ValueError("no answers given: expected at least one row")
    names = list(frame.columns)
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"got the columns {names}, expected question and answer: {', '.join(missing)} is missing")
    if wrong := sorted({str(name) for name in names if names.count(name) > 1 or name in adds}):
        raise ValueError(f"the column {', '.join(wrong)} is repeated, or is added here: rename or drop it")
    if any(is_messages(value) for value in frame["question"]):
        asked = [as_question(value) if is_messages(value) else value for value in frame["question"]]
        frame["question"] = pd.Series(asked, index=frame.index, dtype=object)
    for name in COLUMNS:
        for label, value in frame[name].items():
            if name == "question" and isinstance(value, Conversation):
                value = str(value)
            if not isinstance(value, str):
                raise TypeError(f"{name} of row {label!r} is {value!r}, expected text: drop rows without an answer")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} of row {label!r} is not valid Unicode: {error}") from None
    return frame
