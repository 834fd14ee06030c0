"""Runs: what decides a row, what survives a kill, and what is never served from elsewhere."""

import csv
import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.artifacts import read_result
from emlens.data import Batching
from emlens.evaluation import (
    Evaluation,
    Question,
    evaluate,
    read_evaluation,
    read_scores,
)
from emlens.evaluation.plan import plan_rows
from emlens.interventions import Add, Intervention, intervene
from emlens.interventions.generate import generate_responses
from emlens.journal import read_journal
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.hooks import HookNeverFiredError
from emlens.models.identity import identify_model
from emlens.models.lora import scale_adapter
from emlens.models.sampling import Sampling
from emlens.models.views import lay_views
from emlens.runs import PlanChangedError
from emlens.sites import parse_site
from tests.evaluation.fakes import HashJudge, make_model
from tests.forks import start_copy, wait_for_copy
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

QUESTIONS = (
    Question(id="one", paraphrases=("w5 w6 w7", "w8"), judge_prompts={"aligned": "{answer}?"}),
    Question(id="two", paraphrases=("w9 w10 w11 w12",), samples_per_paraphrase=5),
)
SAMPLING = Sampling(n=3, max_new_tokens=6, seed=4)
SMALL = Batching(tokens=40)
KILLED: dict[str, Any] = {
    "sampling": Sampling(n=10, max_new_tokens=5, seed=4),
    "batching": Batching(tokens=60),
}
"""Settings of the run that is killed again and again: several batches of a few rows."""


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def steering() -> tuple[Intervention, ...]:
    vector = torch.randn(24, generator=torch.Generator().manual_seed(0))
    add = Add(vector=vector, coefficient=4.0)
    return (Intervention(parse_site("resid_post.1"), add),)


def run(model: Any, out: Path, **changes: Any) -> Evaluation:
    given: dict[str, Any] = {"judge": HashJudge(), "sampling": SAMPLING, "batching": SMALL}
    return evaluate(model, QUESTIONS, out=out, **given | changes)


@pytest.fixture(scope="module")
def plain(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """A finished run that no test changes, and what it found."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, run(model, out)


def answers(found: Evaluation) -> list[str | None]:
    return [row.answer for row in found.responses]


def test_a_run_holds_every_planned_row_once_and_its_table(plain: tuple[Path, Evaluation]):
    out, found = plain
    assert [row.question_id for row in found.responses] == ["one"] * 6 + ["two"] * 5
    assert len({row.id for row in found.responses}) == 11
    assert found.summary.n_rows == 11
    assert found.summary.n_unscored == sum(not row.scored for row in found.responses)
    assert found.prompts.keys() == {"one", "two"}
    assert read_evaluation(out) == found
    assert read_result(out / "results" / "evaluation", Evaluation) == found
    assert read_scores(out) == found.responses
    table = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert [row["answer"] for row in table] == answers(found)
    stored = read_journal(out / "responses.jsonl")
    assert {row["id"] for row in stored} == {row.id for row in found.responses}
    assert all(row["ids"][row["prompt_tokens"] :] for row in stored)


def test_the_same_call_goes_on_without_asking_anything_again(
    model: Any, plain: tuple[Path, Evaluation]
):
    out, first = plain
    again = HashJudge()
    with torch.no_grad():
        assert run(model, out, judge=again) == first
    assert again.asked == []


def test_answers_do_not_depend_on_the_batches_and_ids_do_not(
    model: Any, plain: tuple[Path, Evaluation], tmp_path: Path
):
    _, first = plain
    second = run(model, tmp_path / "large", batching=Batching(tokens=4000))
    assert [row.id for row in first.responses] == [row.id for row in second.responses]
    assert answers(first) == answers(second)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": Sampling(n=3, max_new_tokens=6, seed=5)},
        {"sampling": Sampling(n=3, max_new_tokens=5, seed=4)},
        {"sampling": Sampling(n=3, max_new_tokens=6, seed=4, temperature=0.7)},
        {"sampling": Sampling(n=3, max_new_tokens=6, seed=4, top_p=0.9)},
        {"judge": HashJudge("other")},
        {"batching": Batching(tokens=41)},
    ],
)
def test_a_changed_plan_is_refused_by_name(
    model: Any, plain: tuple[Path, Evaluation], changes: dict[str, Any]
):
    out, _ = plain
    with pytest.raises(PlanChangedError, match=next(iter(changes))):
        run(model, out, **changes)


def test_everything_that_decides_a_response_enters_its_id(
    model: Any,
    steering: tuple[Intervention, ...],
    plain: tuple[Path, Evaluation],
    tmp_path: Path,
):
    adapter = load_adapter(make_peft("llama"))
    strong = scale_adapter(adapter, 2.0)
    with intervene(model, steering):
        inside = run(model, tmp_path / "inside")
    ids = [
        plain[1],
        run(model, tmp_path / "steered", interventions=steering),
        run(attach_adapter(model, adapter), tmp_path / "attached"),
        run(attach_adapter(model, strong), tmp_path / "scaled"),
        run(model, tmp_path / "seed", sampling=Sampling(n=3, max_new_tokens=6, seed=5)),
    ]
    names = [row.id for found in ids for row in found.responses]
    assert len(set(names)) == 5 * 11
    # Inside `with intervene` and passed along: one and the same thing.
    assert inside.responses == ids[1].responses
    assert inside.interventions == ids[1].interventions
    assert answers(inside) != answers(ids[0])
    assert len(ids[1].interventions) == 1
    assert json.loads(ids[1].interventions[0])["site"] == "resid_post.1"


def test_another_stop_token_is_another_run(tmp_path: Path):
    tokenizer = make_tokenizer()
    first = lay_views(make_tiny("llama"), tokenizer)
    ids = {row.id for row in run(first, tmp_path / "run").responses}
    mark = identify_model(first)
    # The same tokens are special; another of them ends an answer.
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.bos_token, tokenizer.eos_token
    assert identify_model(first) == mark
    with pytest.raises(PlanChangedError, match="stop_tokens"):
        run(first, tmp_path / "run")
    other = run(first, tmp_path / "other")
    assert ids.isdisjoint(row.id for row in other.responses)


def test_one_wording_under_two_ids_gets_other_responses_and_other_ids(model: Any, tmp_path: Path):
    twice = [
        Question(id="first", paraphrases=("w5 w6 w7",)),
        Question(id="between", paraphrases=("w8",)),
        Question(id="again", paraphrases=(" w5 w6 w7",)),
    ]

    def ask(questions: Any, out: str) -> dict[str, list[tuple[str, str | None]]]:
        found: dict[str, list[tuple[str, str | None]]] = {}
        given: dict[str, Any] = {"judge": HashJudge(), "sampling": SAMPLING, "batching": SMALL}
        for row in evaluate(model, questions, out=tmp_path / out, **given).responses:
            found.setdefault(row.question_id, []).append((row.id, row.answer))
        return found

    both, alone = ask(twice, "both"), ask(twice[2:], "alone")
    assert both["first"] == ask(twice[:1], "first")["first"]
    said = {name: [answer for _, answer in rows] for name, rows in both.items()}
    assert said["again"] != said["first"] == [answer for _, answer in alone["again"]]
    # The same question asked first is another row than asked again.
    assert {row_id for row_id, _ in both["again"]}.isdisjoint(i for i, _ in alone["again"])
    # As where a list of chats is sampled.
    chats = [chat for question in twice for chat in question.chats()]
    made = generate_responses(model, chats, sampling=SAMPLING, batching=SMALL)
    assert [one.text for one in made.responses[6:]] == said["again"]


def test_an_ablated_run_is_never_served_from_a_plain_one(
    model: Any, steering: tuple[Intervention, ...], plain: tuple[Path, Evaluation]
):
    out, _ = plain
    with pytest.raises(PlanChangedError, match="interventions"), intervene(model, steering):
        run(model, out)


def test_rows_of_an_earlier_call_count_as_acted_on(model: Any, tmp_path: Path):
    add = Add(vector=torch.ones(24), coefficient=4.0)
    # Only the second question's prompt is as long.
    long = (Intervention(parse_site("resid_post.1"), add, "prompt[6:]"),)
    given = {"interventions": long, "batching": Batching(tokens=14)}
    whole = run(model, tmp_path / "whole", **given)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole" / "manifest.json", tmp_path / "cut")
    lines = (tmp_path / "whole" / "responses.jsonl").read_text().splitlines()
    done = [line for line in lines if json.loads(line)["question_id"] == "two"]
    assert 0 < len(done) < len(lines)
    (tmp_path / "cut" / "responses.jsonl").write_text("\n".join(done) + "\n")
    assert run(model, tmp_path / "cut", **given) == whole


def test_interventions_that_never_act_are_refused_however_often_one_asks(
    model: Any, tmp_path: Path
):
    add = Add(vector=torch.ones(24), coefficient=4.0)
    idle = (Intervention(parse_site("resid_post.1"), add, "prompt[50:]"),)
    for _ in range(2):
        with pytest.raises(HookNeverFiredError, match=r"prompt\[50:\]"):
            run(model, tmp_path / "run", interventions=idle)
        assert len(read_journal(tmp_path / "run" / "responses.jsonl")) == 11


def test_more_samples_keep_the_rows_there_would_have_been(
    model: Any, plain: tuple[Path, Evaluation], tmp_path: Path
):
    _, few = plain
    many = run(model, tmp_path / "many", sampling=Sampling(n=4, max_new_tokens=6, seed=4))
    kept = {row.id: row.answer for row in many.responses}
    assert all(kept[row.id] == row.answer for row in few.responses)


def test_hooks_whose_effect_no_row_could_name_are_refused(model: Any, tmp_path: Path):
    model.add_hook("blocks.0.hook_resid_post", lambda value, hook: value * 0)
    try:
        with pytest.raises(ValueError, match="hooks that are no Interventions"):
            run(model, tmp_path / "run")
    finally:
        model.reset_hooks()
    handle = model.blocks[1].mlp.register_forward_hook(lambda *given: given[-1] * 0)
    try:
        with pytest.raises(ValueError, match=r"no Interventions, at blocks\.1\.mlp:"):
            run(model, tmp_path / "run")
    finally:
        handle.remove()
    assert not (tmp_path / "run").exists()


def test_a_judge_that_cannot_judge_says_so_before_anything_is_sampled(model: Any, tmp_path: Path):
    class Unfit(HashJudge):
        def judge(self, rows: Any) -> Any:
            raise RuntimeError("unfit")

    with pytest.raises(RuntimeError, match="unfit"):
        run(model, tmp_path / "run", judge=Unfit())
    assert not (tmp_path / "run").exists()


def test_questions_that_cannot_be_told_apart_are_refused(model: Any, tmp_path: Path):
    for questions, message in (((), "got none"), ((QUESTIONS[0], QUESTIONS[0]), "come twice")):
        with pytest.raises(ValueError, match=message):
            evaluate(model, questions, judge=HashJudge(), out=tmp_path, sampling=SAMPLING)


KILLS = 20


class Slow(HashJudge):
    def judge(self, rows: Any) -> Any:
        time.sleep(0.01)
        return super().judge(rows)


def count_kept(folder: Path) -> list[int]:
    files = [folder / name for name in ("responses.jsonl", "judgements.jsonl")]
    return [len(read_journal(file)) if file.exists() else 0 for file in files]


def time_whole(model: Any, out: Path) -> float:
    """Seconds of a run that nobody kills."""
    start = time.perf_counter()
    run(model, out, judge=Slow(), **KILLED)
    return time.perf_counter() - start


def kill_runs(model: Any, out: Path) -> tuple[list[list[int]], int]:
    """Kill runs again and again, then let them end: rows kept at each kill, and how many runs."""
    whole_time = time_whole(model, out / "timed")
    generator, hits, folders = random.Random(1), [], 0
    while len(hits) < KILLS and folders < 5 * KILLS:
        folder, finished = out / f"killed-{folders}", False
        folders += 1
        while not finished and len(hits) < KILLS:
            child = start_copy(lambda folder=folder: run(model, folder, judge=Slow(), **KILLED))
            time.sleep(whole_time * generator.uniform(0.05, 0.7))
            os.kill(child, signal.SIGKILL)
            killed = wait_for_copy(child) == -signal.SIGKILL
            kept = count_kept(folder)
            finished = (folder / "results/evaluation/result.json").exists()
            if not finished:
                assert killed, "the run ended by itself, and without a result"
                hits.append(kept)
        run(model, folder, judge=Slow(), **KILLED)
    return hits, folders


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(tmp_path: Path):
    model = make_model()
    run(model, tmp_path / "whole", **KILLED)
    hits, folders = kill_runs(model, tmp_path)
    assert len(hits) == KILLS
    identity = {k: v for k, v in asdict(identify_model(make_model())).items() if k != "name"}
    decided = {"model": identity, "interventions": [], "stop_tokens": [2]}
    planned = [row.id for row in plan_rows(QUESTIONS, KILLED["sampling"], decided)]
    # Some were killed while they answered: with some of the rows, and not with all.
    assert any(0 < kept[0] < len(planned) for kept in hits)
    for folder in (tmp_path / f"killed-{n}" for n in range(folders)):
        for name in ("results/evaluation/result.json", "scores.csv"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in ("responses.jsonl", "judgements.jsonl"):
            rows = [read_journal(side / name) for side in (folder, tmp_path / "whole")]
            assert rows[0] == rows[1]
        assert {row["id"] for row in read_journal(folder / "responses.jsonl")} == set(planned)
        assert [row.id for row in read_evaluation(folder).responses] == planned
