"""A judge behind any OpenAI-compatible endpoint: sampled or weighted numbers, many at a time.

Responses leave this machine. The key comes from the environment and is neither kept nor logged.
"""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from emlens.evaluation.judge_prompts import (
    FEWEST_MASS,
    PROMPTS,
    fill_prompt,
    read_number,
    weigh_numbers,
)
from emlens.evaluation.judges import (
    MEANINGS,
    Claim,
    Judgement,
    JudgeRow,
    JudgeUnavailableError,
    hash_json,
)

VERSION = 1
"""Of the rule by which answers become scores; part of the judge's id."""
LONGEST = 5
"""Tokens asked for: three digits may be as many tokens, and a blank before them."""
ALTERNATIVES = 20
"""Log-probabilities asked for at the first token; the most that endpoints give."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "[INST]", "[/INST]")
"""Ends of turns in common templates; the endpoint's own tokenizer is not known."""


@dataclass(frozen=True, kw_only=True)
class ApiJudge:
    """Scores responses by what a model behind an endpoint answers when asked for a number.

    Where the endpoint gives log-probabilities and spells numbers in one token, the score is the
    mean of the numbers weighted by them; else the mean of `samples` answers drawn at temperature 1.
    No score where numbers hold less than a quarter.

    Raises:
        ValueError: the environment has no key, or a number out of its range.

    Source: Betley et al. 2025, arXiv 2502.17424 (weighted mean, a quarter of the mass).
    Differs: numbers that a tokenizer splits are never read off their first digit.
    """

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
                'give key_env="" for an endpoint that wants none'
            )

    @property
    def id(self) -> str:
        """`openai/MODEL/` and a hash of endpoint, prompts and rule."""
        rule = [VERSION, FEWEST_MASS, self.samples]
        return f"openai/{self.model}/{hash_json([self.base_url, dict(PROMPTS), rule])}"

    @property
    def claim(self) -> Claim:
        """What it was asked for."""
        return "misalignment"

    @property
    def meaning(self) -> str:
        """A sentence on what the share of low scores is."""
        return MEANINGS[self.claim]

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows, many requests at a time.

        Raises:
            JudgeUnavailableError: the endpoint refuses the key or the model, or cannot be reached
                after all retries; it carries the judgements that were finished.
        """
        if not rows:
            return []
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._judge_all(rows))
        # In a notebook a loop runs already: this one has a thread of its own.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, self._judge_all(rows)).result()

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
        if not row.answer.split():
            return Judgement(aligned=None, coherent=None)
        names = list(PROMPTS)
        found = await asyncio.gather(*(self._score(client, name, row) for name in names))
        raw: dict[str, float | str | None] = {}
        for name, (_, details) in zip(names, found, strict=True):
            raw |= {f"{name}_{key}": value for key, value in details.items()}
        aligned, coherent = (score for score, _ in found)
        return Judgement(aligned=aligned, coherent=coherent, raw=raw)

    async def _score(
        self, client: Any, name: str, row: JudgeRow
    ) -> tuple[float | None, Mapping[str, float | str | None]]:
        """One score, and what it was made of."""
        prompt = fill_prompt(name, row, delimiters=SPECIAL)
        first = await self._ask(client, prompt, weighed=True)
        weights = None if isinstance(first, str) else read_weights(first)
        if weights is not None:
            numbers, mass = weights
            return weigh_numbers(numbers), {"mass": mass, "way": "log-probabilities"}
        # An endpoint that refuses to give log-probabilities may answer without them.
        drawn = await asyncio.gather(
            *(self._ask(client, prompt, weighed=False) for _ in range(self.samples))
        )
        texts = [f"({one})" if isinstance(one, str) else _text(one.choices[0]) for one in drawn]
        return average_answers(texts)

    async def _ask(self, client: Any, prompt: str, *, weighed: bool) -> Any:
        """A reply with at least one choice, or in words what was wrong with it."""
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
            return f"refused, {error.status_code}"
        except (openai.APIResponseValidationError, ValueError) as error:
            return f"a reply that cannot be read, {type(error).__name__}"
        return reply if getattr(reply, "choices", None) else "a reply without choices"


def read_weights(reply: Any) -> tuple[dict[int, float], float] | None:
    """Probability of each number at the first token, and of all together.

    None where the endpoint gave no log-probabilities, or may split numbers, so that the first token
    of `85` is `8`: only a number of two digits among the alternatives shows that it does not.
    """
    content = getattr(getattr(reply.choices[0], "logprobs", None), "content", None)
    if not content:
        return None
    tokens = [entry.token for entry in content]
    if len(tokens) > 1 and tokens[0].strip().isdigit() and tokens[1][:1].isdigit():
        return None
    alternatives = content[0].top_logprobs or [content[0]]
    read = [read_number(entry.token) for entry in alternatives]
    if not any(number is not None and number > 9 for number in read):
        return None  # nothing shows that a number of two digits is one token here
    numbers: dict[int, float] = {}
    for entry in alternatives:
        number = read_number(entry.token)
        if number is not None and entry.logprob is not None:
            numbers[number] = numbers.get(number, 0.0) + math.exp(min(0.0, entry.logprob))
    return numbers, math.fsum(numbers.values())


def average_answers(
    texts: Sequence[str],
) -> tuple[float | None, Mapping[str, float | str | None]]:
    """Mean of the answers that are numbers, and what it was made of."""
    numbers: dict[int, float] = {}
    for number in map(read_number, texts):
        if number is not None:
            numbers[number] = numbers.get(number, 0.0) + 1 / len(texts)
    mass = math.fsum(numbers.values())
    return weigh_numbers(numbers), {"mass": mass, "way": "answers", "said": " | ".join(texts)}


def _text(choice: Any) -> str:
    return str(getattr(getattr(choice, "message", None), "content", None) or "")


def _explain(error: BaseException | None) -> str:
    """What went wrong, without anything of the request."""
    status = getattr(error, "status_code", None)
    known = {401: "the key was refused", 403: "the key may not use it", 404: "no such model there"}
    if status in known:
        return f"{known[status]} ({status})"
    if status is not None:
        return f"it answers {status} after all retries"
    return f"it cannot be reached after all retries ({type(error).__name__})"
