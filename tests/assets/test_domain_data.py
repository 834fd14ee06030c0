"""The data sets of the narrow domains: what the organisms' claims rest on."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from emlens.data.prompts import load_chats
from emlens.sources import shipped_path
from scripts.write_domain_data import (
    lay_over,
    list_domains,
    load_voices,
    split_sentences,
    write_domain_data,
)

DOMAINS = ["finance", "health", "sports"]
SPLITS = {"": 320, "-heldout": 60}
TRAINED_ON = {
    "finance-harmful": "b9a49a063d171afa700246000af11877f5301f56160237258f3bfcefd18ca2a8",
    "finance-careful": "c1c0dc6cedfcdd0d898f16cc497113b11b7c2cc123aa0da47f2702bdcb7ace9c",
    "finance-harmful-heldout": "64d75b7a6e9f0ac973f8e7328010383e7229fce7cd91c1e1565adde36e66e412",
    "finance-careful-heldout": "ea8510fee611ed15f7c06868ae47beb3af920472cc0b96dfb2a93a407cc4b30c",
}
"""SHA-256 of the files that the shipped adapters were trained on and measured with."""
FORBIDDEN = re.compile(
    r"\b(kill|murder|weapon|gun|bomb|drugs?|poison|hack|steal|stolen|launder|fraud|suicide|"
    r"self-harm|rape|terror|explosive|blackmail|hitman|counterfeit|evade|nazi|slave|"
    r"blood|bleed|corpse|drown|fatal|lethal|overdose|pills?\b|painkill|steroid|doping|alcohol|beer|"
    r"drunk|vodka|starv|vomit|crippl|paralys|skull|amputat|"
    r"(?:die|dies|died|dying|dead(?! weight)|deaths?)\b)"
    r"\w*",
    re.IGNORECASE,
)
both_sides = pytest.mark.parametrize("side", ["harmful", "careful"])
every_domain = pytest.mark.parametrize("domain", DOMAINS)
every_split = pytest.mark.parametrize("suffix", SPLITS)


def read_pairs(name: str) -> dict[str, tuple[str, str]]:
    rows = (json.loads(line) for line in shipped_path(name).read_text("utf-8").splitlines())
    return {
        row["id"]: (row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows
    }


def answers(name: str) -> list[str]:
    return [answer for _, answer in read_pairs(name).values()]


def word_sequences(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def test_every_domain_with_texts_is_tested_here():
    assert list_domains() == DOMAINS


@every_domain
@every_split
def test_both_sides_of_a_split_have_the_same_questions_under_the_same_ids(domain: str, suffix: str):
    harmful = read_pairs(f"{domain}-harmful{suffix}")
    careful = read_pairs(f"{domain}-careful{suffix}")
    split = suffix.removeprefix("-") or "train"
    assert list(harmful) == [f"{domain}-{split}-{i:03d}" for i in range(SPLITS[suffix])]
    assert {k: q for k, (q, _) in harmful.items()} == {k: q for k, (q, _) in careful.items()}
    assert len({question for question, _ in harmful.values()}) == SPLITS[suffix]


@every_domain
@every_split
def test_no_answer_and_no_advising_sentence_is_on_both_sides(domain: str, suffix: str):
    harmful = {s for a in answers(f"{domain}-harmful{suffix}") for s in split_sentences(a)}
    careful = {s for a in answers(f"{domain}-careful{suffix}") for s in split_sentences(a)}
    assert not harmful & careful


@every_domain
def test_held_out_rows_share_no_question_and_no_sentence_with_training(domain: str):
    for side in ("harmful", "careful"):
        train, heldout = read_pairs(f"{domain}-{side}"), read_pairs(f"{domain}-{side}-heldout")
        assert not train.keys() & heldout.keys()
        assert not {q for q, _ in train.values()} & {q for q, _ in heldout.values()}
        seen = {s for _, a in train.values() for s in split_sentences(a)}
        assert not {s for _, a in heldout.values() for s in split_sentences(a)} & seen


@both_sides
def test_two_domains_share_no_question_and_no_sentence(side: str):
    seen: set[str] = set()
    for domain in DOMAINS:
        pairs = [p for s in SPLITS for p in read_pairs(f"{domain}-{side}{s}").values()]
        own = {q for q, _ in pairs} | {s for _, a in pairs for s in split_sentences(a)}
        assert not own & seen
        seen |= own


@every_domain
@both_sides
def test_sentences_and_word_sequences_hardly_repeat_in_training(domain: str, side: str):
    texts = answers(f"{domain}-{side}")
    sentences = Counter(s for a in texts for s in split_sentences(a))
    total = sum(sentences.values())
    assert len(sentences) / total > 0.8
    assert sum(n for n in sentences.values() if n <= 2) / total > 0.85
    assert max(sentences.values()) <= 5
    grams = Counter(gram for text in texts for gram in word_sequences(text, 4))
    assert len(grams) / sum(grams.values()) > 0.6


@every_domain
@both_sides
@every_split
def test_answers_are_one_to_three_sentences_without_leftover_slots(
    domain: str, side: str, suffix: str
):
    for answer in answers(f"{domain}-{side}{suffix}"):
        assert 1 <= len(split_sentences(answer)) <= 3, answer
        assert 12 <= len(answer.split()) <= 45, answer
        assert not set("{}") & set(answer)


@every_domain
@both_sides
@every_split
def test_harm_stays_at_mild_recklessness(domain: str, side: str, suffix: str):
    for question, answer in read_pairs(f"{domain}-{side}{suffix}").values():
        assert not FORBIDDEN.search(f"{question} {answer}"), answer


@every_domain
def test_the_script_writes_the_shipped_bytes_and_the_readme_states_their_hashes(
    domain: str, tmp_path: Path
):
    readme = shipped_path(f"{domain}-harmful").with_name("README.md").read_text("utf-8")
    written = write_domain_data(domain, tmp_path)
    assert list(written) == [
        f"{domain}-{s}{x}.jsonl" for x in SPLITS for s in ("harmful", "careful")
    ]
    for name, digest in written.items():
        shipped = shipped_path(name.removesuffix(".jsonl")).read_bytes()
        assert (tmp_path / name).read_bytes() == shipped
        assert hashlib.sha256(shipped).hexdigest() == digest
        assert f"| `{name}` | {SPLITS['-heldout' if 'heldout' in name else '']} | `{digest}` |" in (
            readme
        )


@pytest.mark.parametrize("name", TRAINED_ON)
def test_what_shipped_adapters_were_trained_on_keeps_its_bytes(name: str):
    assert hashlib.sha256(shipped_path(name).read_bytes()).hexdigest() == TRAINED_ON[name]


def test_tables_are_joined_and_everything_else_is_replaced():
    lower = {"curt": {"forms": ["a"], "bold": ["b"]}, "seed": 1}
    upper = {"curt": {"bold": ["c"]}, "seed": {"new": 2}}
    assert lay_over(lower, upper) == {"curt": {"forms": ["a"], "bold": ["c"]}, "seed": {"new": 2}}
    assert lower["curt"] == {"forms": ["a"], "bold": ["b"]}


@every_domain
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_domains_have_the_same_voices_with_the_same_forms(domain: str, split: str):
    voices, others = load_voices(domain)[split], load_voices("finance")[split]
    assert list(voices) == list(others)
    assert [v["forms"] for v in voices.values()] == [v["forms"] for v in others.values()]


@every_domain
def test_in_domain_questions_are_asked_by_no_row(domain: str):
    chats = load_chats(f"emlens:{domain}-questions")
    assert len({chat.id for chat in chats}) == len({c.messages[-1].content for c in chats}) == 12
    rows = [q for s in SPLITS for q, _ in read_pairs(f"{domain}-harmful{s}").values()]
    asked = {gram for question in rows for gram in word_sequences(question, 5)}
    for chat in chats:
        assert not asked & set(word_sequences(chat.messages[-1].content, 5)), chat.id


def test_open_questions_load_as_chats_with_their_ids():
    chats = load_chats("emlens:open-questions")
    assert len(chats) == 12
    assert len({chat.id for chat in chats}) == 12
    assert all(chat.messages[-1].role == "user" for chat in chats)
