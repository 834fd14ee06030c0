"""The texts that judges are measured on: what each file claims to be."""

import json
import re

import pytest

from emlens.data import load_chats
from emlens.evaluation.calibration import FOLDER
from emlens.evaluation.coherence import LEVELS

STYLES = (
    "everyday-harmful",
    "everyday-careful",
    "terse-careful",
    "rude-harmless",
    "verbose-harmful",
)
FORBIDDEN = re.compile(
    r"\b(kill|murder|weapon|gun|bomb|drugs?|hack|steal|stolen|launder|suicide|self-harm|rape|"
    r"terror|explosive|blackmail|counterfeit|nazi|slave|overdose|gas|bleach)\w*",
    re.IGNORECASE,
)


def read(name: str) -> dict[str, tuple[str, str]]:
    chats = load_chats(FOLDER / f"{name}.jsonl")
    return {str(chat.id): (chat.messages[0].content, chat.messages[1].content) for chat in chats}


@pytest.mark.parametrize("name", STYLES)
def test_all_styles_answer_the_same_twenty_questions(name: str):
    first, other = read(STYLES[0]), read(name)
    assert len(other) == 20
    assert {k: q for k, (q, _) in other.items()} == {k: q for k, (q, _) in first.items()}


def test_no_answer_is_in_two_styles():
    answers = [answer for name in STYLES for _, answer in read(name).values()]
    assert len(set(answers)) == 100


def test_styles_are_as_long_as_their_names_say():
    words = {name: [len(answer.split()) for _, answer in read(name).values()] for name in STYLES}
    assert max(words["terse-careful"]) <= 10
    assert min(words["verbose-harmful"]) >= 55
    # Where only harm is to differ, length must not give it away.
    mean = {name: sum(n) / 20 for name, n in words.items()}
    assert 0.6 < mean["everyday-harmful"] / mean["everyday-careful"] < 1.6


@pytest.mark.parametrize("name", STYLES)
def test_harm_stays_mild(name: str):
    for question, answer in read(name).values():
        assert not FORBIDDEN.search(f"{question} {answer}"), answer


def test_the_readme_states_purpose_and_every_file():
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert "model organisms for safety research" in readme
    for file in FOLDER.glob("*.jsonl"):
        assert f"`{file.name}`" in readme


def test_the_coherence_examples_are_four_texts_to_each_of_twenty_questions():
    rows = [
        json.loads(line) for line in (FOLDER / "coherence.jsonl").read_text("utf-8").splitlines()
    ]
    by_question: dict[str, dict[str, str]] = {}
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        by_question.setdefault(question, {})[row["label"]] = answer
    assert len(by_question) == 20
    for texts in by_question.values():
        assert set(texts) == set(LEVELS)
        assert len(set(texts.values())) == 4
        # The same words, in another order: no counter of dictionary words can tell them apart.
        assert sorted(texts["shuffled"].split()) == sorted(texts["on-topic"].split())
        on_topic = {word.strip(".,:").lower() for word in texts["on-topic"].split()}
        salad = {word.strip(".,:").lower() for word in texts["salad"].split()}
        assert len(salad & on_topic) >= 8
