"""A judge behind any OpenAI-compatible endpoint: sampled or weighted numbers, many at a time.

Responses leave this machine. The key comes from the environment and is neither kept nor logged.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emlens.evaluation.asking import (
    ALTERNATIVES,
    Reply,
    ask_for_scores,
    call_beside_loops,
    explain_status,
    fill_prompts,
)
from emlens.evaluation.judge_prompts import FEWEST_MASS, PROMPTS
from emlens.evaluation.judges import (
    GradingJudge,
    Judgement,
    JudgeRow,
    JudgeUnavailableError,
    hash_json,
)

VERSION = 1
"""Of the rule by which answers become scores; part of the judge's id."""
LONGEST = 5
"""Tokens asked for: three digits may be as many tokens, and a blank before them."""


@dataclass(frozen=True, kw_only=True)
class ApiJudge(GradingJudge):
    """Scores responses by what a model behind an endpoint answers when asked for a number.

    Where the endpoint gives log-probabilities and spells numbers in one token, the score is the
    mean of the numbers weighted by them; else the mean of `samples` answers drawn at temperature 1.
    No score where numbers hold less than a quarter.

    Raises:
        ValueError: the environment has no key, or a number out of its range.

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

    def __post_init__(self) -> None:
        for name in ("samples", "concurrency", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if self.key_env and not os.environ.get(self.key_env):
            raise ValueError(
                f"key_env: the environment has no {self.key_env}; set it to the endpoint's key, or "
                "for an endpoint that wants none give key_env='' (--judge-key-env '')"
            )

    @property
    def id(self) -> str:
        """`openai/MODEL/` and a hash of endpoint, prompts and rule."""
        rule = [VERSION, FEWEST_MASS, self.samples]
        return f"openai/{self.model}/{hash_json([self.base_url, dict(PROMPTS), rule])}"

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows, many requests at a time.

        Raises:
            JudgeUnavailableError: the endpoint refuses the key or the model, or cannot be reached
                after all retries; it carries the judgements that were finished.
        """
        if not rows:
            return []
        return call_beside_loops(lambda: asyncio.run(self._judge_all(rows)))

    async def _judge_all(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        import httpx2 as httpx  # the client's own
        import openai

        limits = httpx.Limits(max_connections=self.concurrency)
        # Waiting for a free connection is no failure, however long the others take.
        timeout = httpx.Timeout(self.timeout, pool=None)
        async with openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=os.environ.get(self.key_env, "") or "none",
            max_retries=self.retries,
            http_client=httpx.AsyncClient(limits=limits, timeout=timeout),
        ) as client:
            tasks = [asyncio.ensure_future(self._judge_row(client, row)) for row in rows]
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in waiting:
                task.cancel()
            if waiting:
                await asyncio.wait(waiting)
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

    async def _judge_row(self, client: Any, row: JudgeRow) -> Judgement:
        async def ask(prompt: str, draw: int | None) -> Reply:
            return await self._ask(client, prompt, weighed=draw is None)

        prompts = fill_prompts(row)
        return await ask_for_scores(prompts, ask, samples=self.samples, gather=asyncio.gather)

    async def _ask(self, client: Any, prompt: str, *, weighed: bool) -> Reply:
        import openai

        extra: dict[str, Any] = {"temperature": 1.0}
        if weighed:
            extra = {"temperature": 0.0, "logprobs": True, "top_logprobs": ALTERNATIVES}
        try:
            reply = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=LONGEST,
                **extra,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Reply(text=f"(refused, {error.status_code})")
        except (openai.APIResponseValidationError, ValueError) as error:
            return Reply(text=f"(a reply that cannot be read, {type(error).__name__})")
        return _read_reply(reply)


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
