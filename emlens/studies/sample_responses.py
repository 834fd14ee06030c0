"""What does a model answer? Responses sampled into a run folder that a kill does not empty.

Nothing is judged here: `emlens.evaluate` samples and judges.
"""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data import Batching, Chat, as_chats, text_hash, track
from emlens.interventions import (
    Intervention,
    active_interventions,
    describe_interventions,
    intervene,
)
from emlens.interventions.generate import (
    Response,
    ResponseRequest,
    list_requests,
    stream_responses,
)
from emlens.interventions.hooking import PositionsNeverMetError
from emlens.interventions.met import check_met
from emlens.journal import Journal, read_journal
from emlens.models.generate import Sampling, stop_tokens
from emlens.models.identity import identify_model, refuse_foreign_hooks
from emlens.models.protocol import HookedModel
from emlens.runs import RunFolder

RESPONSES = "responses.jsonl"
RESULT = "responses"
GROUP = 64
"""Responses that are made, killed and made again together."""


@dataclass(frozen=True, kw_only=True)
class SampledResponses(Result):
    """The responses of a run folder."""

    kind: ClassVar[str] = "sampled_responses"

    run: str
    """Run folder; its `responses.jsonl` has a line a response."""
    n_prompts: int
    interventions: tuple[str, ...]
    """What acted on the model, one JSON object each; vectors by their hashes."""
    responses: tuple[Response, ...]
    """In the order of the chats, the samples of one beside each other."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a response."""
        names = ("prompt_index", "prompt_id", "sample", "prompt", "text", "ended")
        return [{name: getattr(one, name) for name in names} for one in self.responses]


def sample_responses(
    model: HookedModel,
    chats: Sequence[Chat | str],
    *,
    sampling: Sampling,
    out: str | Path,
    interventions: Sequence[Intervention] = (),
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> SampledResponses:
    """Sample `sampling.n` responses to every chat; the same call on the same `out` goes on.

    Args:
        model: loaded by emlens, with its tokenizer.
        chats: prompts (str) or chats; a response at the end of one is left out. One that is there
            twice gets other responses the second time.
        sampling: how many, how long and how random.
        out: run folder.
        interventions: act while responses are made.
        batching: rows times (prompt + longest response) that are run at once.

    Raises:
        PlanChangedError: `out` holds a run of another plan.
        ValueError: no tokenizer, no chats, a prompt that leaves no room for a response, or hooks of
            unknown effect.
        HookNeverFiredError: an intervention that acted on no response of the whole run.
    """
    refuse_foreign_hooks(model)
    host: Any = model
    given = as_chats(chats)
    listed = list_requests(model, given, n=sampling.n)
    requests = [dataclasses.replace(one, key=f"{one.prompt_index}-{one.sample}") for one in listed]
    acting = describe_interventions((*active_interventions(model), *interventions))
    identity = dataclasses.asdict(identify_model(model))
    identity.pop("name")
    plan = {
        "kind": SampledResponses.kind,
        "model": identity,
        "interventions": list(acting),
        "stop_tokens": list(stop_tokens(host)),
        "chats": [text_hash(chat.without_response()) for chat in given],
        "sampling": sampling,
        "batching": batching,
    }
    run = RunFolder.start(out, plan)
    unproven = bool(interventions) and not run.has_result(RESULT)
    with Journal(run.path / RESPONSES) as journal, suppress(PositionsNeverMetError):
        # Suppressed for what this call made: the rest of the run may have met such tokens.
        _sample_missing(model, requests, journal, sampling, interventions, batching, unproven)
    found = _collect(run, len(given), requests, acting)
    check_met(interventions, ((len(one.ids), one.prompt_tokens) for one in found.responses))
    run.save_result(RESULT, found)
    return found


def _sample_missing(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    journal: Journal,
    sampling: Sampling,
    interventions: Sequence[Intervention],
    batching: Batching,
    unproven: bool,
) -> None:
    """Make the responses that the journal lacks, group by group."""
    groups = [requests[start : start + GROUP] for start in range(0, len(requests), GROUP)]
    complete = all(request.key in journal for request in requests)
    with ExitStack() as stack:
        if unproven or not complete:
            # Once around all groups: positions that only long texts have may miss in one.
            stack.enter_context(intervene(model, interventions))
        if unproven and complete:
            # Killed before its end, or refused there? One response made again tells.
            list(stream_responses(model, requests[:1], sampling=sampling, batching=batching))
        for group in track(groups, "sampling (responses)", sizes=map(len, groups)):
            if all(request.key in journal for request in group):
                continue
            for batch in stream_responses(model, group, sampling=sampling, batching=batching):
                new = [response for response in batch if response.key not in journal]
                journal.append({"id": one.key, **dataclasses.asdict(one)} for one in new)


def _collect(
    run: RunFolder, n_prompts: int, requests: Sequence[ResponseRequest], acting: Sequence[Any]
) -> SampledResponses:
    rows = {row.pop("id"): row for row in read_journal(run.path / RESPONSES)}
    return SampledResponses(
        run=str(run.path),
        n_prompts=n_prompts,
        interventions=tuple(json.dumps(one, sort_keys=True) for one in acting),
        responses=tuple(
            Response(**{**rows[request.key], "ids": tuple(rows[request.key]["ids"])})
            for request in requests
        ),
    )
