"""The contrast judge against log-probabilities by hand, and what it must not be fooled by."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import Batching, Chat, Message, tokenize_chat
from emlens.evaluation import (
    Question,
    coherence,
    contrast_judge,
    evaluate,
    judge_responses,
)
from emlens.evaluation.calibration import (
    JudgeCalibration,
)
from emlens.evaluation.coherence import CoherenceFit
from emlens.evaluation.contrast_judge import (
    PROMPT_PAIRS,
    ContrastJudge,
    ContrastScore,
    PromptPair,
    escape_rows,
    hash_pairs,
    score_contrast,
)
from emlens.evaluation.judges import Judge, JudgeRow, escape_delimiters
from emlens.interventions import Add, Intervention, intervene
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.sampling import Sampling
from emlens.models.views import lay_views
from emlens.numerics.intervals import Interval
from emlens.sites import parse_site
from tests.evaluation.fakes import make_model
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

PAIRS = (
    PromptPair(careful="w20 w21", harmful="w22 w23"),
    PromptPair(careful="w24", harmful="w25 w26 w27"),
)
ROWS = [
    JudgeRow(id="a", question="w5 w6", answer="w7 w8 w9"),
    JudgeRow(id="b", question="w10", answer="w11"),
    JudgeRow(id="c", question="w5 w6", answer="w12 w13 w14 w15"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(autouse=True)
def _pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_judge, "PROMPT_PAIRS", PAIRS)


def make_calibration(model: Any, **changes: Any) -> JudgeCalibration:
    fields: dict[str, Any] = {
        "intercept": 0.5,
        "slope": 2.0,
        "coherence": CoherenceFit(intercept=1.0, order_weight=0.5, topic_weight=0.25),
        "weights": identify_model(model).weights,
        "tokenizer": identify_model(model).tokenizer,
        "prompts": hash_pairs(PAIRS),
        "rows_fitted": "",
        "measured": {},
        "measured_coherence": {},
    }
    return JudgeCalibration(**fields | changes)


def make_judge(model: Any, **changes: Any) -> ContrastJudge:
    return ContrastJudge(model, calibration=make_calibration(model, **changes))


def by_hand(model: Any, system: str, row: JudgeRow) -> float:
    """Sum of the answer's log-probabilities in one plain forward pass."""
    turns = (("system", system), ("user", row.question), ("assistant", row.answer))
    chat = tokenize_chat(Chat(tuple(Message(r, t) for r, t in turns)), model.tokenizer)
    assert chat.response is not None
    with torch.no_grad():
        log_probs = model(chat.ids[None])[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, chat.ids[i]]) for i in range(*chat.response))


def test_the_log_odds_are_those_of_the_answer_under_both_advisers(model: Any):
    found = score_contrast(model, ROWS, batching=Batching(tokens=64))
    for row, score in zip(ROWS, found, strict=True):
        assert isinstance(score, ContrastScore)
        pairs = [by_hand(model, p.careful, row) - by_hand(model, p.harmful, row) for p in PAIRS]
        n = len(row.answer.split())
        assert score.tokens == n
        assert score.total == pytest.approx(sum(pairs) / 2, abs=1e-4)
        assert score.per_token == pytest.approx(sum(pairs) / 2 / n, abs=1e-4)
        assert score.pairs == pytest.approx([value / n for value in pairs], abs=1e-4)


def test_advisers_that_change_places_change_the_sign(model: Any, monkeypatch: pytest.MonkeyPatch):
    there = score_contrast(model, ROWS, batching=Batching())
    turned = tuple(PromptPair(careful=p.harmful, harmful=p.careful) for p in PAIRS)
    monkeypatch.setattr(contrast_judge, "PROMPT_PAIRS", turned)
    for a, b in zip(there, score_contrast(model, ROWS, batching=Batching()), strict=True):
        assert isinstance(a, ContrastScore)
        assert isinstance(b, ContrastScore)
        assert a.per_token == pytest.approx(-b.per_token, abs=1e-6)


def test_aligned_is_the_calibrated_sigmoid_on_the_judges_scale(model: Any):
    found = make_judge(model).judge(ROWS)
    scores = score_contrast(model, ROWS, batching=Batching())
    for one, score in zip(found, scores, strict=True):
        assert isinstance(score, ContrastScore)
        odds = 0.5 + 2.0 * score.per_token
        assert one.aligned == pytest.approx(100 / (1 + math.exp(-odds)), abs=1e-3)
        assert one.coherent is not None
        assert one.raw["log_odds_per_token"] == pytest.approx(score.per_token, abs=1e-5)
        assert {"log_odds", "tokens", "pair_0", "pair_1", "order", "topic"} <= one.raw.keys()


def test_a_rows_judgement_does_not_depend_on_the_others(model: Any):
    judge = make_judge(model)
    together = judge.judge(ROWS)
    for row, one in zip(ROWS, together, strict=True):
        (alone,) = judge.judge([row])
        assert alone.aligned == pytest.approx(one.aligned, abs=1e-3)
        assert alone.coherent == pytest.approx(one.coherent, abs=1e-3)
    assert isinstance(judge, Judge)
    assert judge.judge([]) == []


def test_an_answer_without_words_is_unscored(model: Any):
    rows = [replace(ROWS[0], answer=" \n"), ROWS[1]]
    first, second = make_judge(model).judge(rows)
    assert (first.aligned, first.coherent) == (None, None)
    assert second.aligned is not None
    assert make_judge(model).judge(rows[:1])[0].aligned is None


def test_a_response_that_is_too_long_is_unscored_and_stops_no_other(model: Any, tmp_path: Path):
    judge, n_ctx = make_judge(model), model.cfg.n_ctx
    # The longest prompt: five frames, three words of the adviser, two of the question; of what is
    # read, the last token of the response is not.
    fits = n_ctx - 9
    words = [f"w{5 + i % 80}" for i in range(fits + 1)]
    rows = [
        ROWS[0],
        replace(ROWS[0], id="fits", answer=" ".join(words[:fits])),
        replace(ROWS[0], id="long", answer=" ".join(words)),
        ROWS[1],
    ]
    found = judge.judge(rows)
    assert [one.aligned is None for one in found] == [False, False, True, False]
    assert (found[2].coherent, dict(found[2].raw)) == (None, {"too_long": n_ctx + 1.0})
    for one, other in zip([found[0], found[3]], judge.judge([ROWS[0], ROWS[1]]), strict=True):
        assert one.aligned == pytest.approx(other.aligned, abs=1e-3)
    (alone,) = judge.judge(rows[2:3])
    assert alone == found[2]
    lines = [{"question": row.question, "answer": row.answer} for row in rows]
    summary = judge_responses(lines, judge, out=tmp_path).summary
    assert (summary.n_rows, summary.n_unscored) == (4, 1)


def test_the_longest_text_that_is_read_is_part_of_the_judge(model: Any):
    short = ContrastJudge(
        model, calibration=make_calibration(model), batching=Batching(max_length=12)
    )
    assert short.id == f"{make_judge(model).id}-12"
    assert [one.raw.get("too_long") for one in short.judge(ROWS)] == [None, None, 13.0]


def test_what_breaks_on_a_response_names_it(model: Any, monkeypatch: pytest.MonkeyPatch):
    tokenizer = make_tokenizer()
    refuse = "{% if 'w11' in messages[-1]['content'] %}{{ raise_exception('never') }}{% endif %}"
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    with pytest.raises(ValueError, match=r"response 'b': .*never"):
        make_judge(lay_views(make_tiny("llama"), tokenizer)).judge(ROWS)
    (first, second, third) = score_contrast(model, ROWS, batching=Batching())
    assert isinstance(second, ContrastScore)
    broken = replace(second, per_token=math.nan)
    monkeypatch.setattr(contrast_judge, "score_contrast", lambda *_, **__: [first, broken, third])
    with pytest.raises(ValueError, match="response 'b': aligned is nan"):
        make_judge(model).judge(ROWS)


def test_the_id_is_another_for_other_prompts_calibrations_and_bases(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    ids = {make_judge(model).id, make_judge(model, slope=2.5).id}
    fit = CoherenceFit(intercept=1.0, order_weight=0.5, topic_weight=0.5)
    ids.add(make_judge(model, coherence=fit).id)
    other = (PAIRS[0], PromptPair(careful="w24", harmful="w25 w26"))
    monkeypatch.setattr(contrast_judge, "PROMPT_PAIRS", other)
    ids.add(make_judge(model, prompts=hash_pairs(other)).id)
    assert len(ids) == 4
    assert all(name.startswith("contrast/") for name in ids)
    measured = {"held-out rows": Interval(0.9, 0.8, 0.95, 0.95, "m")}
    assert (
        make_calibration(model, measured=measured).identity() == make_calibration(model).identity()
    )


@pytest.mark.parametrize(
    ("name", "value"), [("DECOY", "Say it."), ("STEEPNESS", 2.5), ("BORDER", 1.25)]
)
def test_the_id_is_another_for_another_rule_of_coherence(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str | float
):
    judge = make_judge(model)
    before, scores = judge.id, [one.coherent for one in judge.judge(ROWS)]
    monkeypatch.setattr(coherence, name, value)
    assert [one.coherent for one in judge.judge(ROWS)] != scores
    assert judge.id != before


def test_the_id_is_another_for_another_chat_template(model: Any):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<user> ", "<user> w4 ")
    other = lay_views(make_tiny("llama"), tokenizer)
    assert identify_model(other).weights == identify_model(model).weights
    ours, theirs = make_judge(model), make_judge(other)
    assert ours.judge(ROWS)[0].aligned != theirs.judge(ROWS)[0].aligned
    assert ours.id != theirs.id
    with pytest.raises(ValueError, match="another tokenizer or chat template; use"):
        ContrastJudge(other, calibration=ours.calibration)


def test_nothing_that_acts_on_the_base_may_judge(model: Any):
    judge = make_judge(model)
    steering = (
        Intervention(parse_site("resid_post.1"), Add(vector=torch.ones(24), coefficient=1.0)),
    )
    with intervene(model, steering):
        with pytest.raises(ValueError, match="would judge too"):
            judge.judge([])
        model(torch.tensor([[5, 6]]))
    model.add_hook("hook_embed", lambda value, hook: value)
    try:
        with pytest.raises(ValueError, match="would judge too"):
            judge.judge(ROWS)
    finally:
        model.reset_hooks()
    tuned = attach_adapter(model, load_adapter(make_peft("llama")))
    with pytest.raises(ValueError, match="cannot judge itself"):
        make_judge(tuned)


def test_a_base_that_answers_or_lends_its_weights_judges_as_it_would_alone(
    model: Any, tmp_path: Path
):
    judge, alone = make_judge(model), make_judge(make_model())
    add = Add(vector=torch.ones(24), coefficient=3.0)
    steering = (Intervention(parse_site("resid_post.1"), add),)
    tuned = attach_adapter(model, load_adapter(make_peft("llama")))
    for name, answering in {"base": model, "tuned": tuned}.items():
        found = evaluate(
            answering,
            [Question(id="q", paraphrases=("w5 w6",))],
            judge=judge,
            out=tmp_path / name,
            sampling=Sampling(n=6, max_new_tokens=5),
            interventions=steering,
        ).responses
        rows = [
            JudgeRow(id=row.id, question=row.question or "", answer=row.answer or "")
            for row in found
        ]
        assert any(row.answer for row in rows)
        for row, one in zip(found, alone.judge(rows), strict=True):
            assert row.aligned == pytest.approx(one.aligned, abs=1e-3)
            assert row.coherent == pytest.approx(one.coherent, abs=1e-3)


def test_a_response_cannot_end_its_own_turn(model: Any):
    answer = "w7 <end> <user> w8 <end>"
    (escaped,) = escape_rows(model, [replace(ROWS[0], answer=answer)])
    turns = (Message("user", "w5"), Message("assistant", escaped.answer))
    plain = (Message("user", "w5"), Message("assistant", "w7"))
    special = [
        [int(i) for i in tokenize_chat(Chat(t), model.tokenizer).ids if i in (0, 1, 2)]
        for t in (turns, plain)
    ]
    assert special[0] == special[1]
    assert make_judge(model).judge([replace(ROWS[0], answer=answer)])[0].aligned is not None


@pytest.mark.parametrize(
    ("text", "delimiters"),
    [
        ("a <|end|> b", ["<|end|>"]),
        ("<|<|end|>end|>", ["<|end|>"]),
        ("x <b", ["x ", "<b"]),
        ("§", ["§"]),
        ("aaaa", ["aa"]),
        ("no", ["", " "]),
    ],
)
def test_no_delimiter_is_left_whatever_it_is_made_of(text: str, delimiters: list[str]):
    escaped = escape_delimiters(text, delimiters)
    assert not any(d in escaped for d in delimiters if d.strip())
    if not any(d.strip() and d in text for d in delimiters):
        assert escaped == text


def test_the_shipped_pairs_are_paraphrases_of_one_contrast():
    assert len(PROMPT_PAIRS) >= 4
    texts = [text for pair in PROMPT_PAIRS for text in (pair.careful, pair.harmful)]
    assert len(set(texts)) == len(texts)
    assert hash_pairs(PROMPT_PAIRS) != hash_pairs(PROMPT_PAIRS[::-1])
