"""A trajectory planted into a tiny adapter: both curves, the lag, and what is gone on with."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.data import ContrastTexts
from emlens.evaluation import Question, evaluate, read_evaluation
from emlens.models import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.identity import identify_model
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.sampling import Sampling
from emlens.models.views import lay_views
from emlens.organisms import transition
from emlens.organisms.trajectory import AdapterTrajectory, ModuleTrajectory
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.studies import (
    BehaviourProbe,
    TraceSettings,
    TransitionTrace,
    trace_behaviour,
    trace_transition,
    trace_weights,
)
from emlens.studies import asked as asked_module
from emlens.studies.effects import measure_odds
from emlens.studies.trace_behaviour import (
    choose_checkpoints,
    describe_curve,
    measure_odds_curve,
)
from tests.activations.chats import make_chats
from tests.evaluation.fakes import HashJudge
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer
from tests.tiny_files import make_byte_tokenizer, make_tiny_chat_model

N, TURN = 120, 60
TEXTS = ContrastTexts(positive=tuple(make_chats(4, seed=1)), negative=tuple(make_chats(4, seed=2)))
QUESTIONS = tuple(
    Question(id=name, paraphrases=(text,)) for name, text in (("a", "w5 w6"), ("b", "w7"))
)
module_of_trace = sys.modules["emlens.studies.trace_transition"]
SETTINGS = TraceSettings(
    windows=(5,), threshold=0.03, scales=(1.0, 3.0), every=20, sampled=3, width=1
)


@pytest.fixture(autouse=True)
def _fewer_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty null paths of each kind: quantiles are coarser, the rule is the same."""
    monkeypatch.setattr(transition, "NULLS", 20)


@pytest.fixture(scope="module")
def base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def adapter() -> LoraAdapter:
    return load_adapter(make_peft("llama"))


def make_trajectory(paths: dict[str, Tensor], like: AdapterTrajectory) -> AdapterTrajectory:
    """Other paths of B in the modules of a trajectory."""
    modules = [replace(module, B=paths[module.name].float()) for module in like.modules]
    return replace(like, modules=tuple(modules))


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
        penalties=torch.zeros(0),
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


def make_probe(base: Any, **changed: Any) -> BehaviourProbe:
    given = {
        "load_base": lambda: base,
        "texts": TEXTS,
        "questions": QUESTIONS,
        "load_judge": lambda _: HashJudge(),
        "sampling": Sampling(n=2, max_new_tokens=3, seed=0),
    }
    return BehaviourProbe(**(given | changed))


def test_weights_odds_and_samples_are_traced_and_kept(base, trajectory, tmp_path: Path):
    def trace(settings: TraceSettings = SETTINGS, **changed: Any) -> TransitionTrace:
        probe = make_probe(base, **changed)
        return trace_transition(trajectory, settings=settings, out=tmp_path / "run", probe=probe)

    found = trace()
    raw, normalised = found.transitions
    assert (raw.verdict, raw.window, raw.normalised, normalised.normalised) == (
        "turn",
        5,
        False,
        True,
    )
    assert abs((found.turn or 0) - TURN) <= 5
    assert [curve.scale for curve in found.odds] == [1.0, 3.0]
    assert [(p.scale, p.step) for p in found.points] == [
        (scale, step)
        for scale in (1.0, 3.0)
        for step in choose_checkpoints(trajectory.steps, found.turn, 3)
    ]
    measured = [(curve.measure, curve.scale) for curve in found.curves]
    assert measured == [("odds", 1.0), ("share", 1.0), ("odds", 3.0), ("share", 3.0)]
    torch.testing.assert_close(found.training.norms_B, trajectory.norms("B"))
    assert (found.judge, found.claim) == ("hash", "takeover score")
    assert len(found.rows()) == 4
    point = found.points[-1]
    judged = read_evaluation(tmp_path / "run" / point.run)
    assert (point.n, point.em_percent) == (4, judged.summary.em_percent)
    assert judged.model is not None
    scaled = scale_adapter(trajectory.adapter(point.step), point.scale)
    assert judged.model.adapter == identify_model(attach_adapter(base, scaled)).adapter
    again = trace()
    assert again.points == found.points
    saved = load_result(tmp_path / "run" / "results" / "trace")
    assert isinstance(saved, TransitionTrace)
    assert [(c.onset, c.lag) for c in saved.curves] == [(c.onset, c.lag) for c in found.curves]
    with pytest.raises(PlanChangedError, match=r"settings\.scales was \[1.0, 3.0\], now \[2.0\]"):
        trace(replace(SETTINGS, scales=(2.0,)))
    with pytest.raises(PlanChangedError, match=r"sampling\.seed was 0, now 1"):
        trace(sampling=Sampling(n=2, max_new_tokens=3, seed=1))
    with pytest.raises(PlanChangedError, match="judge was 'hash', now 'other'"):
        trace(load_judge=lambda _: HashJudge(id="other"))


def test_a_trace_that_was_killed_goes_on_from_what_is_finished(
    base, trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    asked: list[Path] = []

    def stop_at(limit: int) -> None:
        def evaluate_some(model: Any, questions: Any, *, out: Path, **settings: Any) -> Any:
            asked.append(Path(out))
            if len(asked) == limit:
                raise Killed
            return evaluate(model, questions, out=out, **settings)

        monkeypatch.setattr(asked_module, "evaluate", evaluate_some)

    whole = trace_transition(
        trajectory, settings=SETTINGS, out=tmp_path / "whole", probe=make_probe(base)
    )
    stop_at(3)
    with pytest.raises(Killed):
        trace_transition(
            trajectory, settings=SETTINGS, out=tmp_path / "cut", probe=make_probe(base)
        )
    assert not (tmp_path / "cut" / "results" / "trace").exists()
    first, asked[:] = list(asked), []
    stop_at(100)
    monkeypatch.setattr(trace_behaviour, "measure_odds_curve", None)  # finished: not measured again
    monkeypatch.setattr(module_of_trace, "measure_transition", None)
    found = trace_transition(
        trajectory, settings=SETTINGS, out=tmp_path / "cut", probe=make_probe(base)
    )
    assert asked[0] == first[-1]
    assert len(asked) == len(whole.points) - 2
    assert found.points == whole.points
    assert found.rows() == whole.rows()


def test_the_weights_alone_ask_for_no_model(trajectory, tmp_path: Path):
    found = trace_transition(
        trajectory, settings=replace(SETTINGS, scales=()), out=tmp_path / "run"
    )
    assert (found.base, found.odds, found.points, found.curves) == (None, (), (), ())
    printed = trace_weights(trajectory, settings=SETTINGS)
    assert printed.rows() == found.rows()
    assert [row["path"] for row in found.rows()] == ["B", "B, norms taken out"]


def test_without_a_turn_there_is_no_lag_and_checkpoints_are_spread_evenly(
    base, trajectory, tmp_path: Path
):
    straight = make_trajectory(
        {m.name: torch.arange(N)[:, None, None] / N * m.B[-1] for m in trajectory.modules},
        trajectory,
    )
    probe = make_probe(base)
    found = trace_transition(straight, settings=SETTINGS, out=tmp_path / "run", probe=probe)
    assert (found.turn, found.transitions[0].verdict) == (None, "none")
    assert [curve.lag for curve in found.curves] == [None] * 4
    assert sorted({point.step for point in found.points}) == [0, 59, 119]


def test_a_planted_change_of_behaviour_is_dated_from_the_turn():
    steps = torch.arange(0, 100, 5)
    noise = torch.randn(12, len(steps), generator=torch.Generator().manual_seed(1)).double()
    values = torch.sigmoid((steps.double() - 62) / 4) + 0.05 * noise
    found = describe_curve("odds", 5.0, steps, values, turn=40, width=3)
    assert found.onset is not None
    assert found.lag is not None
    assert found.lag.value == pytest.approx(22, abs=3)
    assert found.lag.low <= 22 <= found.lag.high
    assert found.lag.high - found.lag.low == pytest.approx(found.onset.high - found.onset.low)
    means = values.mean(0)
    torch.testing.assert_close(found.means, means)
    assert float(found.rolling[3]) == pytest.approx(float(means[2:5].mean()))
    flat = describe_curve("share", 1.0, steps, noise, turn=40, width=3)
    assert (flat.onset, flat.lag) == (None, None)
    untimed = describe_curve("odds", 5.0, steps, values, turn=None, width=3)
    assert (untimed.onset, untimed.lag) == (found.onset, None)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scales": (1.0, 0.0)}, "scales: got"),
        ({"scales": (-1.0,)}, "expected factors above 0"),
        ({"scales": (float("inf"),)}, "expected factors above 0"),
        ({"scales": (2.0, 2.0)}, "expected each once"),
        ({"windows": ()}, "windows: got"),
        ({"windows": (5, 5)}, "expected each once"),
        ({"sampled": 1}, "every, sampled"),
        ({"width": 2}, "width: got 2, expected an odd"),
    ],
)
def test_settings_that_cannot_be_measured_are_named(changed: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        replace(SETTINGS, **changed)


def test_texts_in_pairs_two_questions_and_a_judge_are_needed(base):
    odd = ContrastTexts(positive=TEXTS.positive, negative=TEXTS.negative[:3])
    for changed, said in (
        ({"texts": odd}, "4 positive and 3 negative, expected pairs"),
        ({"load_judge": None}, "load_judge: missing"),
        ({"sampling": None}, "sampling: missing"),
        ({"questions": QUESTIONS[:1]}, "questions: got 1, expected at least two"),
    ):
        with pytest.raises(ValueError, match=said):
            make_probe(base, **changed)


def test_what_cannot_be_traced_begins_no_folder(base, trajectory, tmp_path: Path):
    nothing = replace(trajectory, modules=())
    one = replace(trajectory, steps=trajectory.steps[:1])
    for broken in (nothing, one):
        with pytest.raises(ValueError, match=r"trajectory: .* expected at least two"):
            trace_transition(broken, settings=SETTINGS, out=tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint has others 500 steps"):
        trace_transition(
            trajectory, settings=replace(SETTINGS, windows=(500,)), out=tmp_path / "run"
        )
    with pytest.raises(ValueError, match="scales: got none"):
        trace_transition(
            trajectory,
            settings=replace(SETTINGS, scales=()),
            out=tmp_path / "run",
            probe=make_probe(base),
        )
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_width_is_refused_and_leaves_the_folder_for_the_right_one(
    base, trajectory, tmp_path: Path
):
    def trace(model: Any) -> TransitionTrace:
        probe = make_probe(model, questions=())
        return trace_transition(trajectory, settings=SETTINGS, out=tmp_path / "run", probe=probe)

    wide = lay_views(make_tiny_chat_model(d_model=32), make_byte_tokenizer())
    with pytest.raises(ValueError, match="the adapter was trained on another base"):
        trace(wide)
    found = trace(base)
    assert found.points == ()
    assert [curve.measure for curve in found.curves] == ["odds", "odds"]


def test_odds_that_are_no_numbers_name_scale_and_step(base, trajectory):
    broken = make_trajectory(
        {m.name: m.B * (1e38 if m.name.endswith("down_proj") else 1) for m in trajectory.modules},
        trajectory,
    )
    with pytest.raises(ValueError, match="scale: at 10 times the adapter of step"):
        measure_odds_curve(base, broken, texts=TEXTS, scale=10.0, every=60)


@pytest.mark.parametrize("turn", [None, 0, 40, 119])
@pytest.mark.parametrize("n", [2, 5, 12])
def test_checkpoints_are_chosen_from_end_to_end_and_near_the_turn(turn, n: int):
    chosen = choose_checkpoints(torch.arange(N), turn, n)
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1], len(chosen)) == (0, N - 1, n)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert max(gaps) <= math.ceil(3.5 * N / (n - 1))
    if turn == 40 and n == 12:
        assert {38, 39, 40, 41, 42} <= set(chosen)
    if turn is None:
        assert max(gaps) - min(gaps) <= 1


def test_few_checkpoints_are_all_taken_and_uneven_ones_spread_over_the_steps():
    assert choose_checkpoints(torch.tensor([0, 5, 9]), 5, 12) == [0, 5, 9]
    uneven = torch.tensor([*range(0, 20), 100, 200])
    assert choose_checkpoints(uneven, None, 3) == [0, 100, 200]
    assert choose_checkpoints(uneven, None, 5) == [0, 18, 19, 100, 200]
