"""Responses in a run folder: the same whether sampled in one go or after a kill."""

import re
import shutil

import pytest
import torch

from emlens.artifacts import Result
from emlens.data import Batching
from emlens.interventions import Add, Intervention, ablate_direction, add_direction
from emlens.interventions.generate import generate_responses
from emlens.models.generate import Sampling
from emlens.models.hooks import HookNeverFiredError
from emlens.models.views import lay_views, origin_of
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.sites import Site
from emlens.studies import sample_responses
from emlens.studies.sample_responses import RESPONSES, SampledResponses
from emlens.vectors import Direction, Provenance
from tests.diffing.test_compare import make_chats
from tests.models.tiny import make_tiny, make_tokenizer

SAMPLING = Sampling(n=30, temperature=1.0, max_new_tokens=4, seed=3)


def make_direction(model):
    made = Provenance(construction="data", base_fingerprint=origin_of(model).fingerprint)
    return Direction(
        site=Site(1, "resid_post"), vector=torch.ones(model.cfg.d_model), provenance=made
    )


@pytest.fixture(scope="module")
def model():
    return lay_views(make_tiny("llama"), make_tokenizer())


def test_every_chat_gets_its_samples_in_order_and_the_run_can_be_loaded(model, tmp_path):
    chats = make_chats(5, respond=False)
    found = sample_responses(model, chats, sampling=SAMPLING, out=tmp_path / "run")
    assert [(r.prompt_index, r.sample) for r in found.responses] == [
        (chat, sample) for chat in range(5) for sample in range(30)
    ]
    assert len({r.text for r in found.responses}) > 30
    loaded: Result = load_result(tmp_path / "run/results/responses")
    assert isinstance(loaded, SampledResponses)
    assert loaded.responses == found.responses


def test_a_run_cut_short_goes_on_and_ends_as_if_it_had_not_been(model, tmp_path):
    chats = make_chats(5, respond=False)
    given = {"sampling": SAMPLING, "batching": Batching(tokens=400)}
    whole = sample_responses(model, chats, out=tmp_path / "whole", **given)
    sample_responses(model, chats, out=tmp_path / "cut", **given)
    journal = tmp_path / "cut" / RESPONSES
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = 51
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    again = sample_responses(model, chats, out=tmp_path / "cut", **given)
    assert again.responses == whole.responses
    assert journal.read_bytes().splitlines(keepends=True)[:kept] == lines[:kept]


def test_another_plan_is_refused_by_what_differs(model, tmp_path):
    chats = make_chats(2, respond=False)
    few = Sampling(n=1, temperature=1.0, max_new_tokens=2, seed=0)
    sample_responses(model, chats, sampling=few, out=tmp_path)
    other = Sampling(n=1, temperature=1.0, max_new_tokens=2, seed=1)
    with pytest.raises(PlanChangedError, match="seed was 0, now 1"):
        sample_responses(model, chats, sampling=other, out=tmp_path)
    changed = ablate_direction(make_direction(model), at="writes")
    with pytest.raises(PlanChangedError, match="interventions"):
        sample_responses(model, chats, sampling=few, out=tmp_path, interventions=changed)


def test_another_stop_token_is_another_run(tmp_path):
    tokenizer = make_tokenizer()
    own = lay_views(make_tiny("llama"), tokenizer)
    few = Sampling(n=2, temperature=1.0, max_new_tokens=2, seed=0)
    sample_responses(own, ["w5 w6"], sampling=few, out=tmp_path)
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.pad_token, tokenizer.eos_token
    with pytest.raises(PlanChangedError, match="stop_tokens"):
        sample_responses(own, ["w5 w6"], sampling=few, out=tmp_path)


def test_hooks_of_others_are_refused_before_anything_is_written(model, tmp_path):
    few = Sampling(n=1, temperature=1.0, max_new_tokens=2, seed=0)
    handle = model.blocks[1].mlp.register_forward_hook(lambda *given: given[-1] * 0)
    try:
        with pytest.raises(ValueError, match=r"at blocks\.1\.mlp"):
            sample_responses(model, ["w5"], sampling=few, out=tmp_path / "run")
    finally:
        handle.remove()
    assert not (tmp_path / "run").exists()


def test_what_cannot_act_is_refused_before_a_folder_is_begun(model, tmp_path):
    few = Sampling(n=1, temperature=1.0, max_new_tokens=2, seed=0)
    wide = Intervention("resid_post.1", Add(torch.ones(model.cfg.d_model + 1)))
    deep = Intervention("resid_post.9", Add(torch.ones(model.cfg.d_model)))
    for refused, named in ((wide, "width"), (deep, r"resid_post\.9")):
        with pytest.raises(ValueError, match=named):
            sample_responses(
                model, ["w5"], sampling=few, out=tmp_path / "run", interventions=(refused,)
            )
    assert not (tmp_path / "run").exists()


def test_ids_of_responses_hold_what_acted(model, tmp_path):
    few = Sampling(n=2, temperature=1.0, max_new_tokens=2, seed=0)
    plain = sample_responses(model, ["w5"], sampling=few, out=tmp_path / "plain")
    acts = steer(model, "all")
    steered = sample_responses(
        model, ["w5"], sampling=few, out=tmp_path / "steered", interventions=acts
    )
    keys = [one.key for one in (*plain.responses, *steered.responses)]
    assert len(set(keys)) == 4


SHORT, LONG = "w5 w6", "w5 w6 w7 w8 w9 w10 w11 w12 w13"
BRIEF = Sampling(n=8, temperature=1.0, max_new_tokens=2, seed=3)
GROUP = 8
BATCHING = Batching(tokens=GROUP * (len(LONG.split()) + 3 + 2))
"""All samples of the long prompt, its three framing tokens and two new ones; then the short."""


def steer(model, positions):
    direction = make_direction(model)
    return add_direction(direction, coefficient=40.0, units="raw", positions=positions)


def test_interventions_act_on_every_group_and_need_to_find_their_tokens_in_one(model, tmp_path):
    chats = [SHORT, LONG]  # a group each
    acts = steer(model, "prompt[6:]")
    given = {"sampling": BRIEF, "batching": BATCHING}
    found = sample_responses(model, chats, out=tmp_path / "run", interventions=acts, **given)
    plain = sample_responses(model, chats, out=tmp_path / "plain", **given)
    ids = [[one.ids for one in run.responses] for run in (found, plain)]
    assert ids[0][:GROUP] == ids[1][:GROUP]
    assert ids[0][GROUP:] != ids[1][GROUP:]
    whole = generate_responses(model, chats, sampling=BRIEF, interventions=acts)
    assert ids[0] == [one.ids for one in whole.responses]


def test_a_run_goes_on_where_only_responses_are_left_that_the_positions_miss(model, tmp_path):
    acts = steer(model, "prompt[6:]")
    given = {"sampling": BRIEF, "out": tmp_path, "interventions": acts, "batching": BATCHING}
    whole = sample_responses(model, [LONG, SHORT], **given)
    journal = tmp_path / RESPONSES
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:GROUP]))
    assert sample_responses(model, [LONG, SHORT], **given).responses == whole.responses


@pytest.mark.parametrize("positions", ["prompt[40:]", "response[1:]"])
def test_positions_that_no_response_of_the_run_has_are_an_error_however_often_it_is_called(
    model, tmp_path, positions
):
    # Of two new tokens the second is chosen and never run.
    for _ in range(2):
        with pytest.raises(HookNeverFiredError, match=re.escape(positions)):
            sample_responses(
                model,
                [SHORT, LONG],
                sampling=BRIEF,
                batching=BATCHING,
                out=tmp_path,
                interventions=steer(model, positions),
            )


def test_texts_are_chats_and_one_that_comes_again_gets_other_responses(model, tmp_path):
    few = Sampling(n=40, temperature=1.0, max_new_tokens=4, seed=0)
    # 160 rows are several batches: the count goes on from one to the next.
    found = sample_responses(
        model, [SHORT, LONG, SHORT, SHORT], sampling=few, out=tmp_path, batching=Batching(500)
    )
    ids = [one.ids for one in found.responses]
    whole = generate_responses(model, [SHORT, LONG, SHORT, SHORT], sampling=few)
    assert ids == [one.ids for one in whole.responses]
    assert ids[:40] != ids[80:120] != ids[120:] != ids[:40]
    assert found.n_prompts == 4


def test_a_site_that_is_never_reached_is_an_error_however_often_it_is_called(model, tmp_path):
    # The host makes the per-head results only when asked to.
    width = model.cfg.n_heads * model.cfg.d_model
    acts = [Intervention("result.0", Add(torch.ones(width)))]
    few = Sampling(n=1, temperature=1.0, max_new_tokens=2, seed=0)
    for _ in range(2):
        with pytest.raises(HookNeverFiredError, match=r"result\.0"):
            sample_responses(model, [SHORT], sampling=few, out=tmp_path, interventions=acts)


def test_a_run_killed_after_its_last_response_goes_on(model, tmp_path):
    few = Sampling(n=2, temperature=1.0, max_new_tokens=2, seed=0)
    given = {"sampling": few, "out": tmp_path, "interventions": steer(model, "prompt[6:]")}
    whole = sample_responses(model, [SHORT, LONG], **given)
    shutil.rmtree(tmp_path / "results")
    assert sample_responses(model, [SHORT, LONG], **given).responses == whole.responses
