"""A trajectory planted into a tiny adapter: both curves, the lag, and what is gone on with."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import ContrastTexts
from emlens.evaluation import Question
from emlens.models import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.sampling import Sampling
from emlens.models.views import lay_views
from emlens.numerics.onset import estimate_onset
from emlens.organisms import transition
from emlens.organisms.trajectory import AdapterTrajectory, ModuleTrajectory
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.studies import TraceSettings, TransitionTrace, trace_transition
from emlens.studies.effects import measure_odds
from emlens.studies.trace_transition import choose_checkpoints, measure_odds_curve
from tests.activations.chats import make_chats
from tests.evaluation.fakes import HashJudge
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

N, TURN = 120, 60
TEXTS = ContrastTexts(positive=tuple(make_chats(4, seed=1)), negative=tuple(make_chats(4, seed=2)))
SETTINGS = TraceSettings(
    windows=(5,), threshold=0.03, scales=(1.0, 3.0), every=20, sampled=3, width=1
)


@pytest.fixture(scope="module")
def base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def adapter() -> LoraAdapter:
    return load_adapter(make_peft("llama"))


@pytest.fixture(scope="module")
def trajectory(adapter: LoraAdapter) -> AdapterTrajectory:
    """Every B grows along one direction, and from TURN on along its own final value."""
    share = torch.arange(N).double()
    generator = torch.Generator().manual_seed(0)
    modules = []
    for name, module in adapter.modules.items():
        other = torch.randn(module.B.shape, generator=generator)
        other = other * module.B.norm() / other.norm() * 0.05
        before = share.clamp(max=TURN)[:, None, None] / TURN * other * 4
        after = (share - TURN).clamp(min=0)[:, None, None] / (N - 1 - TURN) * module.B
        modules.append(
            ModuleTrajectory(
                name=name,
                scale=module.scale,
                A=module.A.expand(N, *module.A.shape).clone(),
                B=(before + after).float(),
            )
        )
    return AdapterTrajectory(
        source="planted",
        steps=torch.arange(N),
        modules=tuple(modules),
        logged_steps=torch.zeros(0, dtype=torch.int64),
        losses=torch.zeros(0),
        gradient_norms=torch.zeros(0),
    )


def test_the_odds_along_a_training_are_those_of_each_checkpoint(base, trajectory):
    curve = measure_odds_curve(base, trajectory, texts=TEXTS, scale=3.0, every=50)
    assert curve.steps.tolist() == [0, 50, 100, 119]
    for column, step in enumerate(curve.steps.tolist()):
        model = attach_adapter(base, scale_adapter(trajectory.adapter(step), 3.0))
        expected = measure_odds(model, (), TEXTS)
        assert float(curve.odds[:, column].mean()) == pytest.approx(expected, abs=1e-4)
    assert float(curve.odds[:, 0].mean()) == pytest.approx(measure_odds(base, (), TEXTS), abs=1e-4)


def test_weights_odds_and_samples_are_traced_and_kept(
    base, trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transition, "NULLS", 20)
    questions = [Question(id="a", paraphrases=("w5 w6",)), Question(id="b", paraphrases=("w7",))]

    def trace(**changed: Any) -> TransitionTrace:
        given = {
            "texts": TEXTS,
            "settings": SETTINGS,
            "out": tmp_path / "run",
            "questions": questions,
            "judge_with": (HashJudge(), Sampling(n=2, max_new_tokens=3, seed=0)),
            **changed,
        }
        return trace_transition(base, trajectory, **given)

    found = trace()
    raw, normalised = found.transitions
    assert (raw.verdict, raw.window, raw.normalised, normalised.normalised) == (
        "turn",
        5,
        False,
        True,
    )
    assert abs((raw.step or 0) - TURN) <= 5
    assert [curve.scale for curve in found.curves] == [1.0, 3.0]
    assert [(p.scale, p.step) for p in found.behaviour] == [
        (scale, step)
        for scale in (1.0, 3.0)
        for step in choose_checkpoints(trajectory.steps, raw.sharpest, 3)
    ]
    for curve, lag in zip(found.curves, found.lags, strict=True):
        onset = estimate_onset(curve.steps, curve.odds)
        assert lag.change == onset.change
        assert lag.onset == onset.step
        if onset.step is not None and raw.step is not None:
            assert lag.steps is not None
            assert lag.steps.value == pytest.approx(onset.step.value - raw.step)
    assert len(found.rows()) == 2
    again = trace()
    assert again.behaviour == found.behaviour
    saved = load_result(tmp_path / "run" / "results" / "trace")
    assert isinstance(saved, TransitionTrace)
    assert saved.lags == found.lags
    with pytest.raises(PlanChangedError, match="scales"):
        trace(settings=TraceSettings(windows=(5,), threshold=0.03, scales=(2.0,)))


def test_texts_in_pairs_and_a_judge_are_needed(base, trajectory, tmp_path: Path):
    odd = ContrastTexts(positive=TEXTS.positive, negative=TEXTS.negative[:3])
    with pytest.raises(ValueError, match="4 positive and 3 negative, expected pairs"):
        trace_transition(base, trajectory, texts=odd, settings=SETTINGS, out=tmp_path / "a")
    with pytest.raises(ValueError, match="judge_with: missing"):
        trace_transition(
            base,
            trajectory,
            texts=TEXTS,
            settings=SETTINGS,
            out=tmp_path / "b",
            questions=[Question(id="a", paraphrases=("w5",))],
        )


@pytest.mark.parametrize("sharpest", [None, 0, 40, 119])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_checkpoints_are_chosen_from_end_to_end_and_near_the_bend(sharpest, n: int):
    chosen = choose_checkpoints(torch.arange(N), sharpest, n)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1], len(chosen)) == (0, N - 1, n)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(gaps) <= math.ceil(3.5 * N / (n - 1))
    if sharpest == 40 and n == 12:
        assert {38, 39, 40, 41, 42} <= set(chosen)


def test_few_checkpoints_are_all_taken():
    assert choose_checkpoints(torch.tensor([0, 5, 9]), 5, 12) == [0, 5, 9]
