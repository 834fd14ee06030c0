"""Responses kept in a journal as they come, with proof that every intervention acted on some.

For runs that a kill may cut short; responses that are wanted at once come from `generate`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.data import Batching, track
from emlens.interventions.generate import (
    Response,
    ResponseRequest,
    group_requests,
    stream_responses,
)
from emlens.interventions.hooking import intervene
from emlens.interventions.intervention import Intervention
from emlens.interventions.met import meets
from emlens.journal import Journal
from emlens.models.generate import stop_tokens
from emlens.models.hooks import HookNeverFiredError
from emlens.models.identity_record import ModelIdentity
from emlens.models.protocol import HookedModel
from emlens.models.sampling import Sampling


def describe_conditions(
    model: HookedModel, identity: ModelIdentity, acting: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What decides a response beside its prompt and the sampling, as JSON.

    The model by what it computes: the same weights under another path are the same. The stop
    tokens stand beside the tokenizer, whose fingerprint holds which tokens are special, not which
    of them ends an answer.

    Args:
        model: what answers.
        identity: of that model.
        acting: what acts on it, as `describe_interventions` tells it.
    """
    host: Any = model
    return {
        "model": {k: v for k, v in dataclasses.asdict(identity).items() if k != "name"},
        "interventions": list(acting),
        "stop_tokens": list(stop_tokens(host)),
    }


@dataclass(frozen=True)
class ResponseStore:
    """Where the responses of a run are kept, and as what."""

    journal: Journal
    """Its rows hold `id`, `ids` and `prompt_tokens` at least."""
    record: Callable[[Response], Mapping[str, Any]]
    """The row of a response; its `id` is the request's key."""
    finished: bool
    """Whether the run came to its end before, and nothing is left to be proven."""


def keep_responses(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    store: ResponseStore,
    *,
    sampling: Sampling,
    interventions: Sequence[Intervention],
    batching: Batching,
) -> None:
    """Make the responses that a run lacks.

    Batches are planned from the whole run, and one that a kill cut short is made again as a whole,
    so that the responses do not depend on how often it was killed.

    Args:
        model: loaded by emlens, with its tokenizer.
        requests: the whole run; `key` is the id of the row.
        store: where they are kept.
        sampling: as in `stream_responses`.
        interventions: act while responses are made.
        batching: as in `stream_responses`.

    Raises:
        ValueError: rows in the journal that no request is for.
        BatchError: a prompt that leaves no room for the longest response.
        HookNeverFiredError: interventions that met no token in any row, those of earlier calls
            counted.
    """
    journal = store.journal
    _check_strangers(journal, requests)
    resumed, proven = len(journal) > 0, not interventions
    try:
        if any(request.key not in journal for request in requests):
            # Once around all groups: positions that only long answers have may miss in one.
            with intervene(model, interventions):
                _answer(model, requests, store, sampling, batching)
            proven = True
    except HookNeverFiredError:
        if not resumed:
            raise
    if not proven and not store.finished:
        again = _rows_to_act_on(requests, journal, interventions)
        with intervene(model, interventions):
            list(stream_responses(model, again, sampling=sampling, batching=batching))


def _check_strangers(journal: Journal, requests: Sequence[ResponseRequest]) -> None:
    if strangers := set(journal.ids) - {request.key for request in requests}:
        raise ValueError(
            f"{journal.path} holds {len(strangers)} rows that are not in the plan: it was written "
            "by another version of emlens, or by hand; give another folder"
        )


def _answer(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    store: ResponseStore,
    sampling: Sampling,
    batching: Batching,
) -> None:
    journal = store.journal
    groups = group_requests(model, requests, sampling=sampling, batching=batching)
    for group in track(groups, "answering (responses)", sizes=map(len, groups)):
        if all(request.key in journal for request in group):
            continue
        for batch in stream_responses(model, group, sampling=sampling, batching=batching):
            journal.append(
                store.record(response) for response in batch if response.key not in journal
            )


def _rows_to_act_on(
    requests: Sequence[ResponseRequest], journal: Journal, interventions: Sequence[Intervention]
) -> list[ResponseRequest]:
    """For each positions a finished row that has such tokens; any row if there is none.

    Rows of earlier calls say what the positions select, not that anything was done there. Made
    once more, they prove it for a call whose own rows have no such token, or that makes none.
    """
    found: dict[str, None] = {}
    kept = journal.rows()
    for positions in dict.fromkeys(one.where for one in interventions):
        met = (row for row in kept if meets(positions, len(row["ids"]), row["prompt_tokens"]))
        found |= {row["id"]: None for row in itertools.islice(met, 1)}
    return [request for request in requests if request.key in found] or [requests[0]]
