"""What does a model answer? Responses sampled into a run folder that a kill does not empty.

Nothing is judged here: `emlens.evaluate` samples and judges.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data import Batching, Chat, as_chats, text_hash
from emlens.evaluation.evaluation import RESPONSES
from emlens.evaluation.judges import hash_json
from emlens.interventions import Intervention, active_interventions, describe_interventions
from emlens.interventions.generate import Response, ResponseRequest, list_requests
from emlens.interventions.kept import ResponseStore, describe_conditions, keep_responses
from emlens.interventions.plan import plan_interventions
from emlens.journal import Journal, read_journal
from emlens.models.generate import Sampling
from emlens.models.identity import identify_model, refuse_foreign_hooks
from emlens.models.protocol import HookedModel
from emlens.runs import RunFolder

RESULT = "responses"


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
    given = as_chats(chats)
    listed = list_requests(model, given, n=sampling.n)
    everything = (*active_interventions(model), *interventions)
    acting = describe_interventions(everything)
    decided = describe_conditions(model, identify_model(model), acting)
    settings = {k: v for k, v in dataclasses.asdict(sampling).items() if k != "n"}
    requests = [
        dataclasses.replace(one, key=_name_row(one, {**decided, "sampling": settings}))
        for one in listed
    ]
    plan_interventions(model, everything)  # what cannot act says so before a folder is begun
    plan = {
        "kind": SampledResponses.kind,
        **decided,
        "chats": [text_hash(chat.without_response()) for chat in given],
        "sampling": sampling,
        "batching": batching,
    }
    run = RunFolder.start(out, plan)
    with Journal(run.path / RESPONSES) as journal:
        store = ResponseStore(
            journal,
            lambda response: {"id": response.key, **dataclasses.asdict(response)},
            finished=run.has_result(RESULT),
        )
        keep_responses(
            model,
            requests,
            store,
            sampling=sampling,
            interventions=interventions,
            batching=batching,
        )
    found = _collect(run, len(given), requests, acting)
    run.save_result(RESULT, found)
    return found


def _name_row(request: ResponseRequest, decided: Mapping[str, Any]) -> str:
    """Hash of everything that decides a response, and of its place in the run."""
    turns = [[turn.role, turn.content] for turn in request.chat.without_response().messages]
    own = {"turns": turns, "prompt_index": request.prompt_index, "sample": request.sample}
    return hash_json({**decided, **own, "repeat": request.repeat})


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
