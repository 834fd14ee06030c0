"""Responses of a model to chats, sampled under interventions, each with a random stream of its own.

Not for text that exists already: that is scored (`emlens.models.score`). The stream of a response
is keyed by seed, prompt and sample number, so that batching and resuming do not change it; where
a prompt comes again in a list, by how many times it came before too.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from emlens.artifacts import Result
from emlens.data import (
    BatchError,
    Batching,
    Chat,
    TokenizedChat,
    as_chats,
    pad_batch,
    plan_batches,
    tokenize_chat,
    track,
)
from emlens.interventions.active import active_interventions, describe_interventions
from emlens.interventions.hooking import PositionsNeverMetError, intervene
from emlens.interventions.intervention import Intervention
from emlens.interventions.met import check_met
from emlens.models.generate import Generated, generate_tokens, stop_tokens
from emlens.models.identity import identify_model, refuse_foreign_hooks
from emlens.models.identity_record import ModelIdentity
from emlens.models.packed_weights import PackedWeights
from emlens.models.protocol import HookedModel
from emlens.models.sampling import Sampling
from emlens.models.tokenizer_needs import require_tokenizer
from emlens.numerics.counter import derive_key


@dataclass(frozen=True)
class ResponseRequest:
    """One response that is wanted."""

    chat: Chat
    """What is answered; a response at its end is left out."""
    sample: int = 0
    """Number of the response among those to the same prompt: part of its random stream's key."""
    key: str = ""
    """The caller's name for the response; by default the key of its random stream."""
    prompt_index: int = 0
    """The caller's number of the prompt."""
    repeat: int = 0
    """How many chats before this one ask the same: where there are any, part of the key as well."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response, with the very tokens that were read and said."""

    prompt_index: int
    """Index of the chat in the list that was given."""
    prompt_id: str | None
    """The chat's own name."""
    sample: int
    """Number of the response among those to the same prompt, from 0."""
    prompt: str
    """Text of the last user turn."""
    system: str | None
    """Text of the system turn, if there is one."""
    text: str
    """What was said, without special tokens."""
    ids: tuple[int, ...]
    """Tokens of prompt and response, the stop token included."""
    prompt_tokens: int
    """How many of them are the prompt: the response is `ids[prompt_tokens:]`."""
    ended: bool
    """Whether the model ended the response itself: its last token is then a stop token."""
    key: str
    """What the request called it, or the key of its random stream in hexadecimal."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """Tokens of the response without the stop token."""
        return self.ids[self.prompt_tokens : -1 if self.ended else None]


@dataclass(frozen=True, kw_only=True)
class Responses(Result):
    """Responses of one model, under one set of interventions."""

    kind: ClassVar[str] = "responses"

    responses: tuple[Response, ...]
    """In the order of the chats, the samples of one beside each other."""
    model: ModelIdentity
    sampling: Sampling
    interventions: tuple[str, ...]
    """What acted on the model, one JSON object each; vectors by their hashes."""
    padding_waste: float
    """Share of the tokens put through the model that were padding or came after a row's end."""
    seconds: float
    """Time that generation took."""
    tokens_per_second: float
    """Response tokens a second, stop tokens included."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a response."""
        return [
            {
                "prompt_index": one.prompt_index,
                "prompt_id": one.prompt_id,
                "sample": one.sample,
                "prompt": one.prompt,
                "text": one.text,
                "tokens": len(one.ids) - one.prompt_tokens,
                "ended": one.ended,
            }
            for one in self.responses
        ]


def generate_responses(
    model: HookedModel,
    chats: Sequence[Chat | str],
    *,
    sampling: Sampling,
    interventions: Sequence[Intervention] = (),
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Responses:
    """Sample `sampling.n` responses to every chat.

    Each has a random stream of its own: a chat that is there twice gets other responses the second
    time. Those of the first are the ones that it gets alone.

    Args:
        model: a model loaded by emlens, with its tokenizer, with or without an adapter.
        chats: prompts (str) or chats; a response at the end of one is left out.
        sampling: how many, how long and how random.
        interventions: act on every token of every pass that their positions name.
        batching: rows times (prompt + longest response) that are run at once.

    Raises:
        ValueError: no tokenizer, no chats, logits that are no numbers, or hooks that are no
            interventions: the result could not say what acted.
        BatchError: a prompt that leaves no room for the response.
        HookNeverFiredError: an intervention that acted on no response.
    """
    refuse_foreign_hooks(model)
    requests = list_requests(model, chats, n=sampling.n)
    run = _Run(model, requests, sampling, interventions, batching)
    found: dict[int, Response] = {}
    for places, responses in run.batches():
        found |= dict(zip(places, responses, strict=True))
    acting = describe_interventions((*active_interventions(model), *interventions))
    return Responses(
        responses=tuple(found[place] for place in range(len(requests))),
        model=identify_model(model),
        sampling=sampling,
        interventions=tuple(json.dumps(one, sort_keys=True) for one in acting),
        padding_waste=1 - run.needed / run.run,
        seconds=run.seconds,
        tokens_per_second=run.said / run.seconds,
    )


def list_requests(
    model: HookedModel, chats: Sequence[Chat | str], *, n: int
) -> list[ResponseRequest]:
    """List what is wanted of a whole run: `n` responses to every chat, repeated prompts numbered.

    Args:
        model: its tokenizer decides which prompts are the same.
        chats: prompts (str) or chats.
        n: responses to each.

    Raises:
        ValueError: no tokenizer, or no chats.
    """
    given, seen = as_chats(chats), Counter[bytes]()
    requests: list[ResponseRequest] = []
    for index, (chat, prompt) in enumerate(zip(given, _tokenize(given, model), strict=True)):
        ids = prompt.ids.numpy().tobytes()
        requests += [
            ResponseRequest(chat, sample, prompt_index=index, repeat=seen[ids])
            for sample in range(n)
        ]
        seen[ids] += 1
    return requests


def group_requests(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    *,
    sampling: Sampling,
    batching: Batching,
) -> list[list[ResponseRequest]]:
    """Cut a whole run into the batches in which responses are made, longest prompts first.

    Raises:
        BatchError: a prompt that leaves no room for the response.
    """
    _, plan = _plan(model, requests, sampling, batching)
    return [[requests[place] for place in places] for places in plan]


def stream_responses(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    *,
    sampling: Sampling,
    interventions: Sequence[Intervention] = (),
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> Iterator[list[Response]]:
    """Answer requests batch by batch, so that each can be stored before the next begins.

    Batches are planned from the whole list: longest prompts first. Between two of them the model
    is as it was. What is wrong with the requests is said at the call.

    Args:
        model: as in `generate_responses`.
        requests: in any order.
        sampling: `n` is not looked at, the requests are what is wanted.
        interventions: as in `generate_responses`.
        batching: as in `generate_responses`.

    Returns:
        Finished batches, each in the order of the plan.
    """
    run = _Run(model, requests, sampling, interventions, batching)
    return (responses for _, responses in run.batches())


class _Run:
    """Requests turned into prompts and batches, and what answering them took."""

    def __init__(
        self,
        model: HookedModel,
        requests: Sequence[ResponseRequest],
        sampling: Sampling,
        interventions: Sequence[Intervention],
        batching: Batching,
    ):
        self.model: Any = model
        self.requests, self.sampling, self.interventions = requests, sampling, interventions
        self.prompts, self.plan = _plan(model, requests, sampling, batching)
        self.stops = stop_tokens(self.model)
        self.packed = PackedWeights()
        self.needed, self.run, self.said, self.seconds = 0, 0, 0, 0.0

    def batches(self) -> Iterator[tuple[tuple[int, ...], list[Response]]]:
        """Places of the requests in each batch, and their responses."""
        lengths: set[tuple[int, int]] = set()
        for places in track(self.plan, "generating (responses)", sizes=map(len, self.plan)):
            keys = [self._key(place) for place in places]
            start = time.perf_counter()
            generated = self._generate(places, keys)
            self.seconds += time.perf_counter() - start
            self.needed += generated.tokens_needed
            self.run += generated.tokens_run
            self.said += sum(map(len, generated.ids))
            for place, new in zip(places, generated.ids, strict=True):
                prompt_tokens = len(self.prompts[place].ids)
                lengths.add((prompt_tokens + len(new), prompt_tokens))
            yield (
                places,
                [
                    self._response(place, key, ids.tolist(), ended)
                    for place, key, ids, ended in zip(
                        places, keys, generated.ids, generated.ended, strict=True
                    )
                ],
            )
        check_met(self.interventions, lengths)

    def _generate(self, places: tuple[int, ...], keys: list[int]) -> Generated:
        batch = pad_batch(self.prompts, places, pad_id=0)
        generated = None
        try:
            with intervene(self.model, self.interventions), self.packed.used():
                generated = generate_tokens(
                    self.model,
                    batch.ids,
                    batch.mask,
                    sampling=self.sampling,
                    keys=torch.tensor(keys, dtype=torch.int64),
                    stop_ids=self.stops,
                    rows=places,
                )
        except PositionsNeverMetError:
            if generated is None:
                raise
            # Positions such as response[20:] may meet no token in one batch and many in the next:
            # whether they met any at all is asked after the last one.
        return generated

    def _key(self, place: int) -> int:
        ids, request = self.prompts[place].ids.numpy().tobytes(), self.requests[place]
        again = (request.repeat,) if request.repeat else ()
        return derive_key(self.sampling.seed, ids, request.sample, *again)

    def _response(self, place: int, key: int, new: list[int], ended: bool) -> Response:
        request, prompt = self.requests[place], self.prompts[place]
        turns = request.chat.messages
        return Response(
            prompt_index=request.prompt_index,
            prompt_id=request.chat.id,
            sample=request.sample,
            prompt=next(turn.content for turn in reversed(turns) if turn.role == "user"),
            system=next((turn.content for turn in turns if turn.role == "system"), None),
            text=self.model.tokenizer.decode(new, skip_special_tokens=True),
            ids=(*prompt.ids.tolist(), *new),
            prompt_tokens=len(prompt.ids),
            ended=ended,
            key=request.key or f"{key:016x}",
        )


def _plan(
    model: HookedModel,
    requests: Sequence[ResponseRequest],
    sampling: Sampling,
    batching: Batching,
) -> tuple[list[TokenizedChat], tuple[tuple[int, ...], ...]]:
    """Prompts, and places of the requests that run together."""
    prompts = _tokenize([request.chat for request in requests], model)
    lengths = [len(prompt.ids) + sampling.max_new_tokens for prompt in prompts]
    _check_room(lengths, requests, sampling, min(batching.max_length, model.cfg.n_ctx))
    return prompts, plan_batches(lengths, batching)


def _check_room(
    lengths: Sequence[int], requests: Sequence[ResponseRequest], sampling: Sampling, limit: int
) -> None:
    for length, request in zip(lengths, requests, strict=True):
        if length > limit:
            named = "" if request.chat.id is None else f" (id {request.chat.id!r})"
            raise BatchError(
                f"chats: prompt {request.prompt_index}{named} has "
                f"{length - sampling.max_new_tokens} tokens, and max_new_tokens is "
                f"{sampling.max_new_tokens}: together more than {limit}, the smaller of the "
                "model's context and Batching(max_length=...). Shorten the prompt or the response"
            )


def _tokenize(chats: Sequence[Chat], model: HookedModel) -> list[TokenizedChat]:
    """Prompts of chats, each chat rendered once."""
    require_tokenizer(model.tokenizer, "model: it")
    done: dict[Chat, TokenizedChat] = {}
    for chat in chats:
        if chat not in done:
            prompt = chat.without_response()
            done[chat] = tokenize_chat(prompt, model.tokenizer, for_generation=True)
    return [done[chat] for chat in chats]
