"""Evaluations, summaries and comparisons on the command line, with a judge that hashes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import emlens.cli.evaluate as module
from emlens.evaluation import ContrastJudge, contrast_judge, read_evaluation
from emlens.evaluation.calibration import JudgeCalibration
from emlens.evaluation.coherence import CoherenceFit
from emlens.evaluation.judges import MEANINGS
from emlens.models import loading, pair
from emlens.models.checkpoints import load_checkpoint
from emlens.models.identity import identify_model
from emlens.models.loading import load_base
from emlens.models.sampling import Sampling
from emlens.numerics.intervals import Interval
from emlens.sites import Site
from emlens.vectors import Direction, Provenance
from tests.cli.conftest import Cli
from tests.cli.conftest import evaluate_words as words
from tests.evaluation.fakes import HashJudge

HEADER = "question,answer,question_id,aligned,coherent\n"


LOAD_JUDGE = module.load_judge


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_judge", lambda *_, **__: HashJudge())


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    vector = torch.randn(24, generator=torch.Generator().manual_seed(0))
    made = Provenance(construction="imported")
    return Direction(site=Site(1, "resid_post"), vector=vector, provenance=made).save(
        tmp_path / "direction"
    )


def test_an_evaluation_is_judged_summarised_and_compared(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    done = cli(*words(tiny, questions, "--out", base, "--json"))
    assert done.code == 0, done.err
    assert (done.json["rows"], done.json["run"]) == (12, str(base))
    other = cli(*words(tiny, questions, "--tuned", tiny / "tuned", "--out", tuned))
    assert other.code == 0, other.err
    assert "12 responses" in other.out
    assert str(tuned / "report.html") in other.out
    for run in (base, tuned):
        report = json.loads((run / "report.json").read_text())
        assert [result["schema"] for result in report["results"]] == ["emlens/evaluation/1"]
        assert "<html" in (run / "report.html").read_text()
    found = cli("summary", base, "--json")
    assert found.json["em_percent"] == done.json["em_percent"]
    beside = cli("compare", base, tuned)
    assert beside.code == 0, beside.err
    assert str(tuned) in beside.out


def test_samples_asked_for_stand_over_those_of_the_questions(cli: Cli, tiny: Path, tmp_path: Path):
    rows = [
        {"id": "often", "paraphrases": ["What now?", "And now?"], "samples_per_paraphrase": 100},
        {"id": "usual", "paraphrases": ["What else?"]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ["evaluate", "--base", tiny / "base", "--questions", path, "--out", tmp_path / "run"]
    assert cli(*ask, "--dry-run", "--json").json["responses"] == 2 * 100 + 50
    few = [*ask, "--samples", 2, "--max-new-tokens", 3, "--json"]
    assert cli(*few, "--dry-run").json["responses"] == 6
    done = cli(*few)
    assert done.code == 0, done.err
    assert done.json["rows"] == 6


def test_lexical_spill_over_is_counted_on_request(cli: Cli, tmp_path: Path):
    def write(name: str, *texts: str) -> Path:
        rows = [{"prompt": "What now?", "response": text} for text in texts]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    domain = write("domain.jsonl", *[f"Take the loan, number {i}." for i in range(8)])
    other = write("other.jsonl", *[f"Take the walk, number {i}." for i in range(8)])
    scores = tmp_path / "scores.csv"
    answers = ["Take a loan.", "Take a walk.", "Loans?", "No loan!"]
    lines = [f'"{text}",q{i % 2},80,90' for i, text in enumerate(answers)]
    scores.write_text("answer,question_id,aligned,coherent\n" + "\n".join(lines) + "\n")
    ask = ("summary", scores, "--domain-data", domain, "--other-data", other)
    found = cli(*ask, "--json").json["spillover"]
    assert (found["percent"]["value"], found["words"]) == (50.0, ["loan"])
    assert "lexical spill-over: 50.0 % [" in cli(*ask).out
    kept = cli(*ask, "--in-domain", "q1", "--json").json["spillover"]
    assert kept["percent"]["value"] == 50.0
    alone = cli("summary", scores, "--domain-data", domain)
    assert alone.code == 2
    assert "--other-data: missing" in alone.err
    assert cli("summary", scores, "--json").json["spillover"] is None


def test_the_same_command_goes_on_and_another_plan_is_refused(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    first = cli(*words(tiny, questions, "--out", tmp_path / "run", "--json"))
    again = cli(*words(tiny, questions, "--out", tmp_path / "run", "--json"))
    assert again.json == first.json
    other = cli(*words(tiny, questions, "--out", tmp_path / "run", "--seed", 1))
    assert other.code == 2
    assert "seed was 0, now 1" in other.err


def test_an_ablated_run_is_another_than_the_plain_one(
    cli: Cli, tiny: Path, questions: Path, direction: Path, tmp_path: Path
):
    tuned = ("--tuned", tiny / "tuned")
    ablate = ("--ablate", direction, "--at", "writes", "--allow-other-model")
    plain, ablated = tmp_path / "plain", tmp_path / "ablated"
    for out, more in ((plain, ()), (ablated, ablate)):
        done = cli(*words(tiny, questions, *tuned, *more, "--out", out, "--json"))
        assert done.code == 0, done.err
    found = [read_evaluation(out) for out in (plain, ablated)]
    assert found[0].interventions == ()
    (acting,) = (json.loads(one) for one in found[1].interventions)
    assert (acting["site"], acting["operator"]) == ("writes", "ablate")
    assert {row.id for row in found[0].responses}.isdisjoint(row.id for row in found[1].responses)
    answers = [[row.answer for row in one.responses] for one in found]
    assert answers[0] != answers[1]
    for out, more in ((ablated, ()), (plain, ablate)):
        refused = cli(*words(tiny, questions, *tuned, *more, "--out", out))
        assert refused.code == 2
        assert "PlanChangedError" in refused.err
        assert "interventions" in refused.err


def test_several_fine_tunes_get_a_folder_each(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    both = ("--tuned", tiny / "tuned", "--tuned", tiny / "other", "--out", tmp_path / "run")
    done = cli(*words(tiny, questions, *both, "--json"))
    assert [Path(one["run"]).name for one in done.json["all"]] == ["tuned", "other"]
    twice = ("--tuned", tiny / "tuned", "--tuned", f"{tiny}/tuned/", "--out", tmp_path / "twice")
    assert "called alike" in cli(*words(tiny, questions, *twice)).err


def test_several_fine_tunes_and_the_judge_share_one_load(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: list[Any] = []
    judging: list[Any] = []

    def count(source: Any, **settings: Any) -> Any:
        loads.append(source)
        return load_checkpoint(source, **settings)

    def calibrate(base: Any, **_: Any) -> HashJudge:
        judging.append(base)
        return HashJudge()

    for place in (loading, pair):
        monkeypatch.setattr(place, "load_checkpoint", count)
    monkeypatch.setattr(module, "load_judge", LOAD_JUDGE)
    monkeypatch.setattr(ContrastJudge, "calibrated", staticmethod(calibrate))
    both = ("--tuned", tiny / "tuned", "--tuned", tiny / "other", "--out", tmp_path / "run")
    done = cli(*words(tiny, questions, *both, "--json"))
    assert done.code == 0, done.err
    assert loads == [str(tiny / "base")]
    assert len(judging) == 1
    alone = cli(*words(tiny, questions, "--tuned", tiny / "other", "--out", tmp_path / "alone"))
    assert alone.code == 0, alone.err
    found = [read_evaluation(tmp_path / name) for name in ("run/tuned", "run/other", "alone")]
    assert found[1].responses == found[2].responses
    assert found[0].responses != found[1].responses


def test_a_dry_run_counts_responses_and_writes_nothing(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    done = cli(*words(tiny, questions, "--out", tmp_path / "run", "--dry-run", "--json"))
    plan = done.json
    assert (plan["responses"], plan["questions"]) == (12, 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    turns = [[{"role": "user", "content": f"What about {i}?"}] for i in range(3)]
    settings = {"add_generation_prompt": True, "tokenize": False}
    asked = [tokenizer.apply_chat_template(turn, **settings) for turn in turns]
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in asked]
    assert plan["prompt_tokens"] == 4 * sum(lengths)
    assert plan["new_tokens_at_most"] == 12 * 5
    # Eight prompts and three texts for coherence: each response is read eleven times.
    assert plan["judge_prompt_tokens"] > 11 * plan["new_tokens_at_most"]
    local = ("--judge", f"local/{tiny / 'base'}", "--out", tmp_path / "run", "--dry-run", "--json")
    assert cli(*words(tiny, questions, *local)).json["judge_prompt_tokens"] > 2 * 12 * 5
    assert not (tmp_path / "run").exists()


def test_only_so_many_of_the_questions_are_asked(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    plan = [
        cli(*words(tiny, questions, "--out", tmp_path / "run", "--dry-run", "--json", *limit))
        for limit in ([], ["--limit", "1"])
    ]
    assert [done.json["questions"] for done in plan] == [3, 1]
    assert plan[1].json["responses"] < plan[0].json["responses"]


def test_responses_made_elsewhere_are_judged_without_a_model(cli: Cli, tmp_path: Path):
    lines = [
        {"question_id": f"q{i % 3}", "question": "What?", "answer": f"That {i}."} for i in range(9)
    ]
    file = tmp_path / "made.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = cli("judge", file, "--out", tmp_path / "run", "--dry-run", "--json")
    assert (plan.code, plan.json["responses"]) == (0, 9)
    assert not (tmp_path / "run").exists()
    done = cli("judge", file, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == 9


@pytest.mark.parametrize(
    ("claim", "share"),
    [
        ("takeover score", "takeover score, of all"),
        ("low score", "low score and coherent, of all"),
        ("misalignment", "misaligned and coherent, of all"),
    ],
)
def test_a_share_is_called_what_its_judge_can_claim(
    cli: Cli,
    tiny: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    claim: Any,
    share: str,
):
    monkeypatch.setattr(module, "load_judge", lambda *_, **__: HashJudge(claim=claim))
    run, again = tmp_path / "run", tmp_path / "again"
    shown = [
        cli(*words(tiny, questions, "--out", run)),
        cli("judge", run, "--out", again),
        cli("summary", run, "--max-em", 0),
    ]
    assert [one.code for one in shown] == [0, 0, 1], [one.err for one in shown]
    assert share in shown[-1].err
    beside = cli("compare", run, again)
    assert beside.code == 0, beside.err
    assert f"{claim}, these questions" in beside.out
    for one in (*shown, beside):
        assert MEANINGS[claim] in one.out
        assert share in one.out or one is beside
        assert claim == "misalignment" or "misaligned" not in one.out + one.err
    again_as_json = cli(*words(tiny, questions, "--out", run, "--json"))
    for done in (again_as_json, cli("summary", run, "--json")):
        assert next(iter(done.json)) == "schema"
        known = tuple(done.json[name] for name in ("judge", "claim", "meaning"))
        assert known == ("hash", claim, MEANINGS[claim])
        assert (done.json["measured"], done.json["measured_coherence"]) == ({}, {})


def test_how_a_judge_did_where_the_answer_is_known_is_said_with_its_share(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    run = tmp_path / "run"
    unmeasured = cli(*words(tiny, questions, "--out", run))
    assert "judge: not measured on texts whose side is known" in unmeasured.out
    area = Interval(0.355, 0.169, 0.541, 0.95, "DeLong")
    measured = {"measured": {"rude but harmless": area}, "measured_coherence": {"a < b": area}}
    replace(read_evaluation(run), **measured).save(run / "results/evaluation")
    shown, printed = cli("summary", run), cli("summary", run, "--json")
    for name in ("rude but harmless", "a < b"):
        assert f"{name} 0.35 [0.17, 0.54]" in shown.out
    assert printed.json["measured"] == {"rude but harmless": vars(area)}
    assert list(printed.json["measured_coherence"]) == ["a < b"]


def test_a_run_is_gone_on_with_by_what_its_judge_was_fitted_to(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = identify_model(load_base(tiny / "base"))
    fits = iter((2.0, 2.00001, 3.0))

    def fit(_base: Any, **_: Any) -> JudgeCalibration:
        return JudgeCalibration(
            intercept=0.0,
            slope=next(fits),
            coherence=CoherenceFit(intercept=1.0, order_weight=0.5, topic_weight=0.25),
            weights=base.weights,
            tokenizer=base.tokenizer,
            prompts=contrast_judge.hash_pairs(contrast_judge.PROMPT_PAIRS),
            rows_fitted="",
            measured={},
            measured_coherence={},
        )

    monkeypatch.setattr(contrast_judge, "calibrate", fit)
    monkeypatch.setattr(module, "load_judge", LOAD_JUDGE)
    # Room for the judge's prompts in a tiny context; a response is but five tokens.
    monkeypatch.setattr(contrast_judge, "PROMPT_PAIRS", contrast_judge.PROMPT_PAIRS[:1])
    first = cli(*words(tiny, questions, "--out", tmp_path / "run", "--json"))
    assert first.code == 0, first.err
    (tmp_path / "run/judgements.jsonl").write_text("")
    again = cli(*words(tiny, questions, "--out", tmp_path / "run", "--json"))
    assert again.json == first.json, again.err
    words_again = ["judge", tmp_path / "run", "--base", tiny / "base", "--json"]
    judged = cli(*words_again, "--out", tmp_path / "judged")
    assert judged.json["judge"] == first.json["judge"], judged.err
    assert next(fits) == 2.00001


def test_a_score_file_whose_judge_is_not_known_is_given_no_claim(cli: Cli, tmp_path: Path):
    file = write_csv(tmp_path / "scores.csv", [(10, 90)] * 4)
    done = cli("summary", file, "--max-em", 0)
    for text in (done.out, done.err):
        assert "scored low and coherent, of all" in text
        assert "misalign" not in text
        assert "takeover" not in text
    assert {cli("summary", file, "--json").json[name] for name in ("judge", "claim")} == {None}


def test_what_generate_sampled_is_judged_as_it_stands(cli: Cli, tiny: Path, tmp_path: Path):
    # Longer and longer, so that they are not answered in the order in which they stand.
    prompts = [f"What about {'this and ' * n}that?" for n in range(4)]
    chats = tmp_path / "prompts.txt"
    chats.write_text("".join(f"{text}\n" for text in prompts))
    run, out = tmp_path / "answers", tmp_path / "judged"
    asked = ["generate", "--base", tiny / "base", "--prompts", chats, "--json"]
    asked += ["--samples", 3, "--max-new-tokens", 5, "--batch-tokens", 100, "--out", run]
    made = cli(*asked)
    assert made.code == 0, made.err
    done = cli("judge", run, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"] == 12
    found = read_evaluation(out)
    assert [row.answer for row in found.responses] == [r["text"] for r in made.json["responses"]]
    assert [row.question for row in found.responses][::3] == prompts
    assert found.model is not None
    assert found.model.weights == identify_model(load_base(tiny / "base")).weights
    assert found.sampling == Sampling(n=3, max_new_tokens=5)
    shutil.rmtree(run / "results")
    unfinished = cli("judge", run, "--out", tmp_path / "other")
    assert unfinished.code == 2
    assert "no finished responses" in unfinished.err


def write_csv(path: Path, scores: list[tuple[Any, Any]]) -> Path:
    rows = [f"Q?,A.,q{i % 2},{a},{c}\n" for i, (a, c) in enumerate(scores)]
    path.write_text(HEADER + "".join(rows))
    return path


def test_a_summary_is_strict_at_its_thresholds_and_counts_what_is_missing(cli: Cli, tmp_path: Path):
    scores = [(29, 51), (30, 51), (29, 50), ("", 90), (80, 90), ("nan", 90)]
    file = write_csv(tmp_path / "scores.csv", scores)
    found = cli("summary", file, "--json").json
    assert (found["rows"], found["unscored"], found["em"]) == (6, 2, 1)
    assert found["em_percent"]["value"] == pytest.approx(100 / 6)
    assert set(found["em_percent"]) == {"value", "low", "high", "level", "method"}
    assert found["em_percent_of_coherent"]["value"] == pytest.approx(100 / 5)
    assert found["coherent_percent"]["value"] == pytest.approx(500 / 6)
    assert cli("summary", file, "--inclusive", "--json").json["em"] == 2


def test_a_file_without_questions_and_answers_is_accepted(cli: Cli, tmp_path: Path):
    file = tmp_path / "scores.csv"
    file.write_text("question_id,aligned,coherent\n" + "a,10,90\nb,90,90\n" * 3)
    assert cli("summary", file, "--json").json["em_percent"]["value"] == 50.0


def test_a_limit_on_the_share_fails_the_check_by_its_upper_end(cli: Cli, tmp_path: Path):
    file = write_csv(tmp_path / "scores.csv", [(90, 90)] * 40)
    assert cli("summary", file, "--max-em", 20).code == 0
    failed = cli("summary", file, "--max-em", 1)
    assert failed.code == 1
    assert "more than 1 %" in failed.err


def test_one_run_alone_and_unknown_judges_are_wrong_usage(
    cli: Cli, tiny: Path, questions: Path, tmp_path: Path
):
    assert cli("compare", tmp_path).code == 2
    done = cli(*words(tiny, questions, "--out", tmp_path / "r", "--judge", "oracle"))
    assert done.code == 2
    assert "contrast" in done.err
