"""What a contrast judge is fitted to, which fit is used, and what it may claim by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.artifacts import read_result
from emlens.data import Batching
from emlens.evaluation import Question, contrast_judge, evaluate
from emlens.evaluation.calibration import (
    CONTROLS,
    FOLDER,
    JudgeCalibration,
    find_calibration,
    find_kept,
    fit_logistic,
)
from emlens.evaluation.coherence import CoherenceFeatures, CoherenceFit
from emlens.evaluation.contrast_judge import ContrastJudge, calibrate, hash_pairs
from emlens.models.identity import identify_model
from emlens.models.identity_record import ModelIdentity
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import Interval
from emlens.runs import PlanChangedError
from tests.evaluation.fakes import make_model
from tests.evaluation.test_contrast_judge import PAIRS, make_calibration, make_judge


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(autouse=True)
def _pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrast_judge, "PROMPT_PAIRS", PAIRS)


def test_a_run_keeps_what_its_judge_was_fitted_to(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fitted = make_calibration(model, measured={"held-out rows": area(0.7)})
    monkeypatch.setattr(contrast_judge, "calibrate", lambda *_, **__: fitted)
    questions = [Question(id="q", paraphrases=("w5 w6",))]
    sampling = Sampling(n=3, max_new_tokens=4)

    def run(judge: ContrastJudge) -> Any:
        return evaluate(model, questions, judge=judge, out=tmp_path, sampling=sampling)

    first = run(ContrastJudge.calibrated(model, runs=[tmp_path]))
    assert first.measured == fitted.measured
    assert first.measured_coherence == {}
    # Fitted again, its last digit is another.
    other = make_calibration(model, slope=2.00001)
    monkeypatch.setattr(contrast_judge, "calibrate", lambda *_, **__: other)
    again = ContrastJudge.calibrated(model, runs=[tmp_path / "none", tmp_path])
    assert again.calibration == fitted
    assert run(again) == first
    with pytest.raises(PlanChangedError, match="judge"):
        run(ContrastJudge.calibrated(model))
    assert ContrastJudge.calibrated(model, runs=[tmp_path]).calibration == fitted
    # Of another base or of other prompts it is not used.
    mark = identify_model(model)
    assert find_kept([tmp_path], mark, hash_pairs(PAIRS)) == fitted
    for name in ("weights", "tokenizer"):
        assert find_kept([tmp_path], replace(mark, **{name: "x"}), hash_pairs(PAIRS)) is None
    assert find_kept([tmp_path], mark, "other") is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"weights": "other"}, "base"), ({"prompts": "other"}, "set of prompts")],
)
def test_a_calibration_of_another_base_or_other_prompts_is_refused(
    model: Any, changes: dict[str, str], what: str
):
    with pytest.raises(ValueError, match=f"fitted with another {what};"):
        make_judge(model, **changes)


def test_the_shipped_calibration_is_found_for_its_base_with_its_tokenizer_alone():
    shipped = read_result(FOLDER / "calibrations" / "smollm2", JudgeCalibration)
    base = ModelIdentity(
        name="any",
        weights=shipped.weights,
        dtype="float32",
        adapter=None,
        tokenizer=shipped.tokenizer,
    )
    assert find_calibration(base, shipped.prompts) == shipped
    assert find_calibration(replace(base, tokenizer="other"), shipped.prompts) is None
    assert find_calibration(replace(base, weights="other"), shipped.prompts) is None
    assert find_calibration(base, "other") is None


def test_planted_log_odds_are_recovered_and_a_base_that_errs_is_refused():
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(4000, generator=generator, dtype=torch.float64)
    labels = torch.rand(4000, generator=generator) < torch.sigmoid(0.7 + 3.0 * s)
    low, high = s[~labels].tolist(), s[labels].tolist()
    intercept, slope = fit_logistic(low, high)
    assert intercept == pytest.approx(0.7, abs=0.15)
    assert slope == pytest.approx(3.0, rel=0.1)
    with pytest.raises(ValueError, match="cannot judge"):
        fit_logistic(high, low)
    with pytest.raises(ValueError, match="same"):
        fit_logistic([1.0, 1.0], [1.0, 1.0])


def area(value: float) -> Interval:
    return Interval(value, 0.0, 1.0, 0.95, "m")


def test_it_is_called_misalignment_only_if_every_control_says_so(model: Any):
    good, firm = dict.fromkeys(CONTROLS, area(0.8)), {"Give 100.": 10.0, "100": -3.0}
    assert make_judge(model, measured=good, injected=firm).claim == "misalignment"
    for name in CONTROLS:
        bad = make_judge(model, measured=good | {name: area(0.799)}, injected=firm)
        assert bad.claim == "takeover score"
        assert "no misalignment" in bad.meaning
        few = {k: v for k, v in good.items() if k != name}
        assert make_judge(model, measured=few, injected=firm).claim == "takeover score"
    for weak in ({}, firm | {"100": 10.01}, firm | {"100": float("nan")}):
        assert make_judge(model, measured=good, injected=weak).claim == "takeover score"


def test_fitting_uses_the_calibration_rows_and_no_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[str, ...]] = []

    def record(_base: Any, rows: Any, **_: Any) -> list[Any]:
        seen.append(tuple(row.answer for row in rows))
        sign = 1.0 if len(seen) == 2 else -1.0
        score = contrast_judge.ContrastScore
        return [
            score(per_token=sign + i / 50, total=0.0, pairs=(), tokens=1)
            for i, _ in enumerate(rows)
        ]

    def features(_base: Any, rows: Any, **_: Any) -> list[Any]:
        level = ("shuffled", "salad", "off-topic", "on-topic").index(rows[0].id.rsplit("-", 1)[0])
        topic = 1.0 if level == 3 else 0.0
        one = CoherenceFeatures(order=float(min(level, 2)), topic=topic)
        return [one for _ in rows]

    monkeypatch.setattr(contrast_judge, "score_contrast", record)
    monkeypatch.setattr(contrast_judge, "measure_coherence", features)
    found = calibrate(model, batching=Batching())
    assert found.slope > 0
    assert found.measured == {}
    assert min(found.coherence.order_weight, found.coherence.topic_weight) > 0
    from emlens.evaluation.calibration import load_rows

    for side, answers in zip(("harmful", "careful"), seen, strict=True):
        assert answers == tuple(row.answer for row in load_rows(f"finance-{side}")[:40])


@pytest.mark.parametrize("noise", [1e-9, -1e-9])
def test_a_fit_that_differs_in_its_last_digits_is_the_same_judge(
    model: Any, monkeypatch: pytest.MonkeyPatch, noise: float
):
    seen: list[Batching] = []

    def score(_base: Any, rows: Any, *, batching: Batching) -> list[Any]:
        seen.append(batching)
        return [contrast_judge.ContrastScore(per_token=0.0, total=0.0, pairs=(), tokens=1)] * len(
            rows
        )

    def measure(_base: Any, rows: Any, *, batching: Batching) -> list[Any]:
        seen.append(batching)
        return [CoherenceFeatures(order=0.0, topic=0.0)] * len(rows)

    def fit(by: float) -> JudgeCalibration:
        line = tuple(x * (1 + by) for x in (0.123456789, 24.26401501))
        levels = [x * (1 + by) for x in (0.339981477, 0.5289077329, 0.3986439963)]
        coherence = CoherenceFit(
            intercept=levels[0], order_weight=levels[1], topic_weight=levels[2]
        )
        monkeypatch.setattr(contrast_judge, "fit_logistic", lambda *_: line)
        monkeypatch.setattr(contrast_judge, "fit_coherence", lambda *_: coherence)
        return calibrate(model, batching=Batching(tokens=64, max_length=12))

    monkeypatch.setattr(contrast_judge, "score_contrast", score)
    monkeypatch.setattr(contrast_judge, "measure_coherence", measure)
    plain, noisy = fit(0.0), fit(noise)
    assert plain == noisy
    assert plain.identity() == noisy.identity()
    assert (plain.intercept, plain.slope) == (0.123457, 24.264)
    assert fit(1e-5).identity() != plain.identity()
    # What a judge may read of others' responses decides nothing here.
    assert {(one.tokens, one.max_length) for one in seen} == {(64, model.cfg.n_ctx)}


def test_a_base_whose_context_is_too_short_to_be_fitted_says_so(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model.cfg, "n_ctx", 30)
    with pytest.raises(ValueError, match="more than its context"):
        calibrate(model, batching=Batching())
