"""The demo from end to end on tiny models; on the real one it runs from the built wheel."""

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlens.codecs import CodecError, save_sae
from emlens.data.prompts import hash_chats
from emlens.evaluation import Judgement, JudgeRow
from emlens.prompt_sets import OverlappingPromptsError
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.sources import SourceError
from emlens.studies import DemoResult, run_demo
from tests.features.planted import make_codec

study = importlib.import_module(run_demo.__module__)
STAGES = {"plan", "load", "judge", "removal", "diff_heldout", "nulls_heldout", "diff_answers"}
STAGES |= {"features", "report", "total"}
WAITED = 3.0
"""Seconds before the whole run."""
ARMS = ["base", "tuned", "ablated", "control", "steered", "careful twin"]


class LengthJudge:
    """Scores the letters of a response: a random tiny model cannot judge."""

    id, claim, meaning = "fake/letters", "takeover score", "How many letters e there are."

    @classmethod
    def calibrated(cls, base: Any) -> "LengthJudge":
        return cls()

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        return [
            Judgement(aligned=sum(map(ord, row.answer)) % 101 * 1.0, coherent=90.0) for row in rows
        ]


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Another judge, and a quick demo that steers, too: on one answer of each kind."""
    patch.setattr(study, "ContrastJudge", LengthJudge)
    features = replace(study.QUICK.features, odds=1)
    patch.setattr(study, "QUICK", replace(study.QUICK, features=features))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def run_tiny(tiny: Path, out: Path, **more: Any) -> DemoResult:
    sources = {name: str(tiny / name) for name in ("base", "tuned", "twin", "sae")}
    return run_demo(out, **{"quick": True, **sources, **more})


@pytest.fixture(scope="module")
def timed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult, float]:
    """A whole run that began before its imports, its result, and its seconds from then on."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        began = time.perf_counter() - WAITED
        result = run_tiny(tiny, out, began=began)
        return out, result, time.perf_counter() - began


@pytest.fixture
def done(timed: tuple[Path, DemoResult, float]) -> tuple[Path, DemoResult]:
    return timed[:2]


def test_the_report_holds_behaviour_proof_comparisons_answers_and_seconds(
    done: tuple[Path, DemoResult], tmp_path: Path
):
    out, result = done
    report = json.loads((out / "report.json").read_text())
    kinds = [part["schema"].split("/")[1] for part in report["results"]]
    assert kinds[:2] == ["direction_removal", "persona_features"]
    assert kinds[2:] == ["adapter_proof", "model_diff", "null_band", "model_diff", "adapter_proof"]
    answers = report["extra"]["answers"]
    assert len(answers) == 3
    assert list(answers[0]["answers"]) == ["base", "tuned", "ablated", "steered"]
    assert set(result.seconds) >= STAGES
    assert report["seconds"] == result.seconds
    assert (result.modules_in_effect, result.modules) == (6, 6)
    assert min(result.kl_heldout, result.kl_answers, result.kl_nulls_high) > 0
    assert Path(result.report).read_text().startswith("<!")
    assert load_result(result.save(tmp_path / "saved")).to_dict() == result.to_dict()


def test_latents_of_fine_tune_and_twin_are_compared_and_steered_on_fixed_answers(
    done: tuple[Path, DemoResult], tiny: Path
):
    out, result = done
    found = result.features
    assert [one.tuned for one in found.models] == [str(tiny / name) for name in ("tuned", "twin")]
    assert [one.misaligned for one in found.models] == [True, False]
    assert [one.n_prompts for one in found.models] == [study.QUICK.features.chats] * 2
    assert found.screen is not None
    assert found.cards is not None
    assert len(found.plain) == 2
    plan = json.loads((out / "latents/manifest.json").read_text())["plan"]
    for key, name in (("positive", "everyday-harmful"), ("negative", "everyday-careful")):
        assert plan[key] == hash_chats(study.read_chats(name)[:1])
    assert '<section id="features"' in Path(result.report).read_text()


def test_an_autoencoder_that_is_not_there_or_does_not_fit_is_refused_before_anything_runs(
    tiny: Path, tmp_path: Path
):
    with pytest.raises(SourceError, match=r"emlens:no-such-sae is not shipped.*; nearest"):
        run_tiny(tiny, tmp_path / "run", sae="emlens:no-such-sae")
    wide = save_sae(make_codec(d_in=30), tmp_path / "wide")
    with pytest.raises(CodecError, match=r"takes activations of width 30"):
        run_tiny(tiny, tmp_path / "run", sae=str(wide))
    assert not (tmp_path / "run").exists()


def test_the_seconds_of_the_stages_are_those_on_the_clock(timed: tuple[Path, DemoResult, float]):
    _, result, wall = timed
    stages = dict(result.seconds)
    total = stages.pop("total")
    assert WAITED <= stages["imports"] < WAITED + 1
    assert sum(stages.values()) <= total + 0.02
    assert total <= wall
    assert total - sum(stages.values()) < 0.1 * total
    assert wall - total < 3 * stages["report"] + 0.1 * wall
    assert list(result.seconds)[-1] == "total"


def test_each_arm_is_an_evaluation_of_its_own_beside_a_control_of_like_damage(
    done: tuple[Path, DemoResult],
):
    out, result = done
    removal = result.removal
    assert [arm.role for arm in removal.arms] == ARMS
    assert [arm.n for arm in removal.arms] == [3] * len(ARMS)
    assert sorted(path.name for path in (out / "behaviour/arms").iterdir()) == sorted(
        [*ARMS, "fit"]
    )
    kls = {arm.role: arm.kl for arm in removal.arms}
    assert kls["base"] is kls["tuned"] is None
    disturbed = removal.disturbance
    assert kls["control"] == disturbed.controls[disturbed.nearest]
    assert len(disturbed.controls) >= 16
    assert kls["ablated"] == disturbed.ablated > 0


def test_a_second_run_computes_nothing_and_finds_the_same(
    done: tuple[Path, DemoResult], tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed again")

    out, first = done
    studies = ("compare_models", "compare_nulls", "remove_direction", "find_demo_features")
    for name in ("load_base", "load_pair", *studies):
        monkeypatch.setattr(study, name, refuse)
    again = run_tiny(tiny, out)
    assert replace(again, seconds={}).to_dict() == replace(first, seconds={}).to_dict()
    added = {name for name, spent in again.seconds.items() if spent != first.seconds.get(name)}
    assert added <= {"plan", "report", "total"}
    assert again.seconds["total"] > first.seconds["total"]


def test_an_interrupted_demo_goes_on_where_it_was(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def run(*broken: str) -> DemoResult:
        with monkeypatch.context() as patch:
            for name in broken:
                patch.setattr(study, name, interrupt)
            return run_tiny(tiny, tmp_path / "run")

    with pytest.raises(KeyboardInterrupt):
        run("compare_nulls")
    with pytest.raises(KeyboardInterrupt):
        run("remove_direction", "find_demo_features")
    seconds = run("remove_direction", "compare_nulls").seconds
    assert set(seconds) >= STAGES
    assert seconds["total"] >= sum(seconds.values()) / 2
    assert seconds["total"] > seconds["removal"]


def test_a_full_demo_is_another_plan_than_a_quick_one(done: tuple[Path, DemoResult], tiny: Path):
    with pytest.raises(PlanChangedError, match=r"size\.questions was 3, now 6"):
        run_tiny(tiny, done[0], quick=False)


def test_questions_of_two_uses_are_refused_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(study, "QUESTIONS", study.FIT)
    with pytest.raises(OverlappingPromptsError, match="serve to fit and to evaluate"):
        run_tiny(tiny, tmp_path / "run")
    assert not (tmp_path / "run/behaviour").exists()


def test_what_is_no_adapter_is_refused(tiny: Path, tmp_path: Path):
    sources: dict[str, Any] = {name: str(tiny / name) for name in ("base", "tuned", "sae")}
    with pytest.raises(ValueError, match=r"twin: .* is no adapter"):
        run_demo(tmp_path / "run", quick=True, twin=str(tiny / "base"), **sources)
