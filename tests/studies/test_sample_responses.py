"""Responses in a run folder: the same whether sampled in one go or after a kill."""

import pytest
import torch

from emlens.artifacts import Result
from emlens.interventions import ablate_direction
from emlens.models.generate import Sampling
from emlens.models.views import lay_views, origin_of
from emlens.results import load_result
from emlens.runs import PlanChangedError
from emlens.sites import Site
from emlens.studies import sample_responses
from emlens.studies.sample_responses import GROUP, RESPONSES, SampledResponses
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
    whole = sample_responses(model, chats, sampling=SAMPLING, out=tmp_path / "whole")
    sample_responses(model, chats, sampling=SAMPLING, out=tmp_path / "cut")
    journal = tmp_path / "cut" / RESPONSES
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = GROUP + 11
    journal.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    again = sample_responses(model, chats, sampling=SAMPLING, out=tmp_path / "cut")
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
