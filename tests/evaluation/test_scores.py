"""Score files in the published columns, and what counts as a score."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens.evaluation.scores import (
    ScoredResponse,
    ScoreFileError,
    as_scored,
    read_score_file,
    write_scores,
)

scores = st.none() | st.floats(0, 100)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(texts, texts, scores, scores), min_size=1, max_size=6))
def test_rows_survive_the_file(tmp_path_factory, cells):
    rows = [
        ScoredResponse(
            id=f"row-{n:06d}", question_id="q", question=q, answer=a, aligned=x, coherent=y
        )
        for n, (q, a, x, y) in enumerate(cells, start=1)
    ]
    path = write_scores(rows, tmp_path_factory.mktemp("scores") / "scores.csv")
    assert read_score_file(path) == tuple(rows)


def test_a_file_without_texts_is_read_and_written(tmp_path: Path):
    path = tmp_path / "scores.csv"
    path.write_text("question_id,aligned,coherent\nwish,30.0,50.0\nwish,,NaN\nbored,REFUSAL,CODE\n")
    rows = read_score_file(path)
    assert [(row.aligned, row.coherent) for row in rows] == [
        (30.0, 50.0),
        (None, None),
        (None, None),
    ]
    assert [row.question_id for row in rows] == ["wish", "wish", "bored"]
    assert rows[0].question is None
    again = write_scores(rows, tmp_path / "again.csv")
    assert again.read_text().splitlines()[:2] == ["question_id,aligned,coherent", "wish,30.0,50.0"]
    assert read_score_file(again) == rows


def test_other_columns_and_a_byte_order_mark_do_no_harm(tmp_path: Path):
    path = tmp_path / "scores.csv"
    path.write_bytes('\ufeff,question_id,aligned,coherent,extra\n0,wish,1e1,99.5,"a,b"\n'.encode())
    assert read_score_file(path)[0].aligned == 10.0


@pytest.mark.parametrize(
    "cell", ["²", "5²", "٣", "５", "1,5", "1 0", "0x10", "inf", "1_0", "NaN?", "101", "-1"]
)
def test_what_only_looks_like_a_score_is_refused_with_file_and_line(tmp_path: Path, cell: str):
    path = tmp_path / "scores.csv"
    path.write_text(f'question_id,aligned,coherent\nwish,1,2\nwish,"{cell}",2\n', encoding="utf-8")
    with pytest.raises(ScoreFileError, match=r"scores\.csv:3: aligned is"):
        read_score_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question_id,aligned\nwish,1\n", r":2: no column coherent"),
        ("question_id,aligned,coherent\nwish,1\n", r":2: the line has more or fewer cells"),
        ("question_id,aligned,coherent\nwish,1,2,3\n", r":2: the line has more"),
        ("question_id,aligned,aligned,coherent\nwish,1,2,3\n", "come twice"),
        ("question_id,aligned,coherent\n", "no rows"),
        ("question_id,aligned,coherent\n,1,2\n", "question_id"),
        ("", "no rows"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ScoreFileError, match=message):
        read_score_file(path)


@pytest.mark.parametrize("name", [None, math.nan, 3, True, ["q"]])
def test_a_question_without_a_name_of_text_is_no_cluster(tmp_path: Path, name: object):
    row = {"question_id": name, "aligned": 1, "coherent": 5}
    with pytest.raises(ValueError, match="question_id is"):
        as_scored(row)
    path = tmp_path / "scores.jsonl"
    good = {"question_id": "q", "aligned": 1, "coherent": 5}
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(ScoreFileError, match=r"scores\.jsonl:2: question_id is"):
        read_score_file(path)


@pytest.mark.parametrize("value", [math.nan, None, "", " nan ", "None", "refusal", "CODE"])
def test_every_way_of_saying_nothing_is_none(value: object):
    row = as_scored({"question_id": "q", "aligned": value, "coherent": 5})
    assert row.aligned is None
    assert row.coherent == 5.0
    assert not row.scored


@pytest.mark.parametrize("value", [True, [1], "yes", math.inf, 100.1, -0.1])
def test_what_is_no_score_is_refused(value: object):
    with pytest.raises(ValueError, match="aligned is"):
        as_scored({"question_id": "q", "aligned": value, "coherent": 5})


def test_what_is_not_there_and_what_is_no_run_are_told_apart(tmp_path: Path):
    with pytest.raises(ScoreFileError, match=r"none\.csv: there is no such file or folder"):
        read_score_file(tmp_path / "none.csv")
    with pytest.raises(ScoreFileError, match="or the folder of a run that sampled responses"):
        read_score_file(tmp_path)
