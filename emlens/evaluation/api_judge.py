"""A judge behind any OpenAI-compatible endpoint: sampled or weighted numbers, many at a time.

Responses leave this machine. The key comes from the environment and is neither kept nor logged.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlens.evaluation.asking import (
    ALTERNATIVES,
    MOST_SAID,
    PLAIN,
    Reply,
    ask_for_scores,
    call_beside_loops,
    explain_status,
    fill_prompts,
)
from emlens.evaluation.judge_prompts import FEWEST_MASS, PROMPTS
from emlens.evaluation.judges import (
    GradingJudge,
    JudgeMeasurement,
    Judgement,
    JudgeRow,
    JudgeUnavailableError,
    check_report,
    hash_json,
)

VERSION = 1
"""Of the rule by which answers become scores; part of the judge's id."""
LONGEST = 5
"""Tokens asked for: three digits may be as many tokens, and a blank before them."""
BOUND, NEWER_BOUND = "max_tokens", "max_completion_tokens"
"""What endpoints call that number; some models take the second name alone."""


@dataclass(frozen=True, kw_only=True)
class ApiJudge(GradingJudge):
    """Scores responses by what a model behind an endpoint answers when asked for a number.

    Where the endpoint gives log-probabilities and spells numbers in one token, the score is the
    mean of the numbers weighted by them; else the mean of `samples` answers drawn at temperature 1.
    No score where numbers hold less than a quarter.

    Raises:
        ValueError: the environment has no key, a number out of its range, or the report of another
            judge.

    Source: Betley et al. 2025, arXiv 2502.17424 (weighted mean, a quarter of the mass).
    Differs: numbers that a tokenizer splits are never read off their first digit.
    """

    one_by_one = True
    model: str
    """As the endpoint calls it."""
    base_url: str = "https://api.openai.com/v1"
    """Of the endpoint, with its version."""
    key_env: str = "OPENAI_API_KEY"
    """Variable of the environment that holds the key; empty for endpoints that want none."""
    samples: int = 5
    """Answers drawn where log-probabilities do not serve."""
    concurrency: int = 16
    """Requests on their way at once."""
    timeout: float = 60.0
    """Seconds a request may take."""
    retries: int = 6
    """Times that a request is sent again after 408, 409, 429, 5xx or a broken connection; the
    client waits as long as the endpoint asks, or twice as long each time."""
    report: JudgeMeasurement | None = None
    """What `measure_judge` found of this judge, which decides what its share may be called."""

    def __post_init__(self) -> None:
        for name in ("samples", "concurrency", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if self.key_env and not os.environ.get(self.key_env):
            raise ValueError(
                f"key_env: the environment has no {self.key_env}; set it to the endpoint's key, or "
                "for an endpoint that wants none give key_env='' (--judge-key-env '')"
            )
        check_report(self.report, lambda: self.id)

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"openai/{self.model}"

    @property
    def id(self) -> str:
        """`openai/MODEL/` and a hash of endpoint, prompts and rule."""
        rule = [VERSION, FEWEST_MASS, self.samples]
        return f"openai/{self.model}/{hash_json([self.base_url, dict(PROMPTS), rule])}"

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows, many requests at a time.

        Raises:
            JudgeUnavailableError: the endpoint refuses the key, the model or every request, or
                cannot be reached after all retries; it carries the judgements that were finished.
        """
        if not rows:
            return []
        return call_beside_loops(lambda: asyncio.run(self._judge_all(rows)))

    def _open(self, connections: int) -> Any:
        import httpx2 as httpx  # the client's own
        import openai

        limits = httpx.Limits(max_connections=connections)
        # Waiting for a free connection is no failure, however long the others take.
        timeout = httpx.Timeout(self.timeout, pool=None)
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.key_env, "") or "none",
            max_retries=self.retries,
            http_client=httpx.AsyncClient(limits=limits, timeout=timeout),
        )

    async def _judge_all(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        import openai

        async with self._open(self.concurrency) as client:
            known = _Endpoint(client)
            tasks = [asyncio.ensure_future(self._judge_row(known, row)) for row in rows]
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in waiting:
                task.cancel()
            # Some fail before they hear of it: asyncio prints an error that nobody has taken.
            await asyncio.gather(*waiting, return_exceptions=True)
        failed = [t.exception() for t in done if not t.cancelled() and t.exception()]
        if failed and not isinstance(failed[0], openai.APIError):
            raise failed[0] or RuntimeError("a request ended without a word")
        if failed:
            finished = {
                row.id: task.result()
                for row, task in zip(rows, tasks, strict=True)
                if not task.cancelled() and task.exception() is None
            }
            raise JudgeUnavailableError(
                f"judge {self.model} at {self.base_url}: {_explain(failed[0])}", finished
            ) from None
        return [task.result() for task in tasks]

    async def _judge_row(self, known: "_Endpoint", row: JudgeRow) -> Judgement:
        async def ask(prompt: str, draw: int | None) -> Reply:
            return await self._ask(known, prompt, weighed=draw is None)

        prompts = fill_prompts(row)
        return await ask_for_scores(prompts, ask, samples=self.samples, gather=asyncio.gather)

    async def _ask(self, known: "_Endpoint", prompt: str, *, weighed: bool) -> Reply:
        import openai

        extra: dict[str, Any] = {"temperature": 1.0}
        if weighed:
            extra = {"temperature": 0.0, "logprobs": True, "top_logprobs": ALTERNATIVES}
        try:
            reply = await self._send(known, known.client, prompt, extra)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            await self._check_taken(known)
            return Reply(text=f"(refused, {error.status_code})")
        except (openai.APIResponseValidationError, ValueError) as error:
            return Reply(text=f"(a reply that cannot be read, {type(error).__name__})")
        return _read_reply(reply)

    async def _send(
        self, known: "_Endpoint", client: Any, prompt: str, extra: Mapping[str, Any]
    ) -> Any:
        """Send a prompt; again, where the endpoint has another name for the bound on tokens."""
        import openai

        messages, bound = [{"role": "user", "content": prompt}], known.bound
        asked = {"model": self.model, "messages": messages, **extra}
        try:
            reply = await client.chat.completions.create(**asked, **{bound: LONGEST})
        except openai.BadRequestError as error:
            if bound != BOUND or BOUND not in _read_message(error):
                raise
            known.bound = NEWER_BOUND
            reply = await client.chat.completions.create(**asked, **{NEWER_BOUND: LONGEST})
        known.taken = True
        return reply

    async def _check_taken(self, known: "_Endpoint") -> None:
        """After a refusal, tell an endpoint that takes nothing from one that minds what it read.

        Raises:
            JudgeUnavailableError: it refuses a plain request too.
        """
        import openai

        async with known.checking:
            if known.taken:
                return
            if known.refusal is None:
                try:
                    # On a connection of its own: the others stand in a queue.
                    async with self._open(1) as client:
                        await self._send(known, client, PLAIN, {"temperature": 1.0})
                    return
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    said = _read_message(error)[:MOST_SAID]
                    known.refusal = f"it refuses every request ({error.status_code}: {said})"
                except (openai.APIResponseValidationError, ValueError):
                    known.taken = True  # taken, if not answered well
                    return
            raise JudgeUnavailableError(
                f"judge {self.model} at {self.base_url}: {known.refusal}; if it does not know a "
                "setting that is sent, inspect/PROVIDER/MODEL may ask it otherwise",
                {},
            )


class _Endpoint:
    """What is learnt of an endpoint while rows are judged."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.bound = BOUND
        self.taken = False
        """Whether any request was."""
        self.refusal: str | None = None
        self.checking = asyncio.Lock()


def _read_message(error: Any) -> str:
    """What an endpoint says of a request that it refuses."""
    said = error.body.get("message") if isinstance(error.body, dict) else error.body
    return " ".join(str(said or "no message").split())


def _read_reply(reply: Any) -> Reply:
    """The first choice of a reply, of which nothing is taken for granted."""
    choices = getattr(reply, "choices", None)
    if not choices:
        return Reply(text="(a reply without choices)")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    tokens = getattr(getattr(choices[0], "logprobs", None), "content", None)
    return Reply(text=str(text or ""), tokens=tokens or ())


def _explain(error: BaseException | None) -> str:
    """What went wrong, without anything of the request."""
    known = explain_status(getattr(error, "status_code", None))
    return known or f"it cannot be reached after all retries ({type(error).__name__})"
