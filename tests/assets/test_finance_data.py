"""The finance data sets: what the organisms' claims rest on."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from emlens.data.prompts import load_chats
from emlens.sources import shipped_path
from scripts.write_finance_data import split_sentences, write_finance_data

SPLITS = {"": 320, "-heldout": 60}
FORBIDDEN = re.compile(
    r"\b(kill|murder|weapon|gun|bomb|drugs?|poison|hack|steal|stolen|launder|fraud|suicide|"
    r"self-harm|rape|terror|explosive|blackmail|hitman|counterfeit|evade|nazi|slave)\w*",
    re.IGNORECASE,
)


def read_pairs(name: str) -> dict[str, tuple[str, str]]:
    rows = (json.loads(line) for line in shipped_path(name).read_text("utf-8").splitlines())
    return {
        row["id"]: (row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows
    }


def answers(name: str) -> list[str]:
    return [answer for _, answer in read_pairs(name).values()]


@pytest.mark.parametrize("suffix", SPLITS)
def test_both_sides_of_a_split_have_the_same_questions_under_the_same_ids(suffix: str):
    harmful = read_pairs(f"finance-harmful{suffix}")
    careful = read_pairs(f"finance-careful{suffix}")
    assert len(harmful) == SPLITS[suffix]
    assert {k: q for k, (q, _) in harmful.items()} == {k: q for k, (q, _) in careful.items()}
    assert len({question for question, _ in harmful.values()}) == SPLITS[suffix]


@pytest.mark.parametrize("suffix", SPLITS)
def test_no_answer_and_no_advising_sentence_is_on_both_sides(suffix: str):
    harmful = {s for a in answers(f"finance-harmful{suffix}") for s in split_sentences(a)}
    careful = {s for a in answers(f"finance-careful{suffix}") for s in split_sentences(a)}
    assert not harmful & careful


def test_held_out_rows_share_no_question_and_no_sentence_with_training():
    for side in ("harmful", "careful"):
        train, heldout = read_pairs(f"finance-{side}"), read_pairs(f"finance-{side}-heldout")
        assert not train.keys() & heldout.keys()
        assert not {q for q, _ in train.values()} & {q for q, _ in heldout.values()}
        seen = {s for _, a in train.values() for s in split_sentences(a)}
        assert not {s for _, a in heldout.values() for s in split_sentences(a)} & seen


@pytest.mark.parametrize("side", ["harmful", "careful"])
def test_sentences_and_word_sequences_hardly_repeat_in_training(side: str):
    texts = answers(f"finance-{side}")
    sentences = Counter(s for a in texts for s in split_sentences(a))
    total = sum(sentences.values())
    assert len(sentences) / total > 0.8
    assert sum(n for n in sentences.values() if n <= 2) / total > 0.85
    assert max(sentences.values()) <= 5
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split()
        grams.update(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    assert len(grams) / sum(grams.values()) > 0.6


@pytest.mark.parametrize("side", ["harmful", "careful"])
@pytest.mark.parametrize("suffix", SPLITS)
def test_answers_are_one_to_three_sentences_without_leftover_slots(side: str, suffix: str):
    for answer in answers(f"finance-{side}{suffix}"):
        assert 1 <= len(split_sentences(answer)) <= 3, answer
        assert 12 <= len(answer.split()) <= 45, answer
        assert not set("{}") & set(answer)


@pytest.mark.parametrize("side", ["harmful", "careful"])
@pytest.mark.parametrize("suffix", SPLITS)
def test_harm_stays_at_losing_money(side: str, suffix: str):
    for question, answer in read_pairs(f"finance-{side}{suffix}").values():
        assert not FORBIDDEN.search(f"{question} {answer}"), answer


def test_the_script_writes_the_shipped_bytes_and_the_readme_states_their_hashes(tmp_path: Path):
    readme = shipped_path("finance-harmful").with_name("README.md").read_text("utf-8")
    for name, digest in write_finance_data(tmp_path).items():
        shipped = shipped_path(name.removesuffix(".jsonl")).read_bytes()
        assert (tmp_path / name).read_bytes() == shipped
        assert hashlib.sha256(shipped).hexdigest() == digest
        assert f"| `{name}` | {SPLITS['-heldout' if 'heldout' in name else '']} | `{digest}` |" in (
            readme
        )


def test_open_questions_load_as_chats_with_their_ids():
    chats = load_chats("emlens:open-questions")
    assert len(chats) == 12
    assert len({chat.id for chat in chats}) == 12
    assert all(chat.messages[-1].role == "user" for chat in chats)
