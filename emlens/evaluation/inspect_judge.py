"""Any model that inspect_ai knows as a judge, with its caching and its log viewer.

Responses leave this machine unless the model is on it. Not for one OpenAI-compatible endpoint:
`ApiJudge` needs far less. inspect_ai is an extra, and not imported unless it is used.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from emlens.evaluation.asking import (
    ALTERNATIVES,
    MOST_SAID,
    PLAIN,
    Reply,
    call_beside_loops,
    explain_status,
)
from emlens.evaluation.inspect_task import make_task, read_judgements
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
REFUSED = (400, 422)
"""Statuses of a request that is refused for what it holds, not for who sends it."""
_EXTRA = ("inspect_ai", "dotenv")
"""Modules that the extra installs."""
_RUNNING = {"max_connections", "max_retries", "timeout", "attempt_timeout", "cache", "batch"}
"""Settings of a model that decide when it answers, not what."""


@dataclass(frozen=True, kw_only=True)
class InspectJudge(GradingJudge):
    """Scores stored responses as a task of inspect_ai, whose logs stay and can be looked at.

    The score is made as that of `ApiJudge`. Keys are found where inspect_ai looks for them: in each
    provider's own variable, or in a `.env` file.

    Raises:
        ValueError: a number out of its range, a model that is no PROVIDER/NAME, two places for its
            endpoint, or the report of another judge.

    Source: Betley et al. 2025, arXiv 2502.17424 (weighted mean, a quarter of the mass).
    Differs: numbers that a tokenizer splits are never read off their first digit.
    """

    one_by_one = True
    model: Any
    """As inspect_ai calls it, such as `openai/gpt-4o`; or what its `get_model` gave, for a model
    that needs arguments."""
    log_dir: str | Path
    """Folder of the `.eval` logs, one for each batch of a run; `inspect view` shows them."""
    base_url: str | None = None
    """Of the endpoint, where a name does not say enough."""
    samples: int = 5
    """Answers drawn where log-probabilities do not serve."""
    max_tokens: int = 16
    """Of an answer; the least that OpenAI's newer interface takes. A model that thinks before it
    answers needs thousands."""
    concurrency: int = 16
    """Requests on their way at once."""
    timeout: int = 60
    """Seconds a request may take."""
    retries: int = 6
    """Times that a request is sent again where its provider thinks that this may help."""
    cache: bool = True
    """Whether inspect_ai keeps answers for a week, so that what was asked is not asked again; a
    second opinion on the same responses needs False."""
    report: JudgeMeasurement | None = None
    """What `measure_judge` found of this judge, which decides what its share may be called."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "concurrency", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if not isinstance(self.model, str):
            if self.base_url is not None:
                raise ValueError("base_url: given with a model that has its own, expected a name")
        elif "," in self.model or "/" not in self.model.strip("/"):
            raise ValueError(
                f"model: got {self.model!r}, expected one PROVIDER/NAME as inspect_ai has them, "
                "such as openai/gpt-4o"
            )
        check_report(self.report, lambda: self.id)

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"inspect/{self.model}"

    @property
    def id(self) -> str:
        """`inspect/MODEL/` and a hash of model, endpoint, prompts and rule."""
        rule = [VERSION, FEWEST_MASS, self.samples, self.max_tokens]
        decided = [_describe(self.model), self.base_url, dict(PROMPTS), rule]
        return f"inspect/{self.model}/{hash_json(decided)}"

    def judge(self, rows: Sequence[JudgeRow]) -> list[Judgement]:
        """Score rows as one run of a task.

        Raises:
            JudgeUnavailableError: inspect_ai, the key or the model is not there, or stays away
                after all retries; it carries the judgements that were finished.
            ValueError: a provider that inspect_ai does not know.
        """
        if not rows:
            self._check()
            return []
        known = _Asked()
        logs = call_beside_loops(lambda: self._run(rows, known))
        if not logs or logs[0].status == "cancelled":
            # After Ctrl-C it ends in good order, and keeps to itself that it was told to end: with
            # the log, or without it where it was waiting for its tasks.
            raise KeyboardInterrupt
        (log,) = logs
        found = read_judgements(log.location)
        if log.status != "success" or len(found) < len(rows):
            # Requests that fail together reach the log as a group, without a word of their own.
            reason = known.failures[0] if known.failures else f"the run ended with {log.status}"
            raise JudgeUnavailableError(
                f"judge inspect/{self.model}: {reason}; the log is {log.location}",
                found,
            )
        return [found[row.id] for row in rows]

    def _check(self) -> None:
        """Find inspect_ai, the provider and its key, or say what is missing; asks nothing."""
        with self._explained():
            from dotenv import find_dotenv, load_dotenv
            from inspect_ai.model import get_model

            if found := find_dotenv(usecwd=True):
                load_dotenv(found)
            get_model(self.model, base_url=self.base_url)

    def _run(self, rows: Sequence[JudgeRow], known: "_Asked") -> Any:
        """The logs of a task over rows; what is learnt on the way goes into `known`."""
        with self._explained(), _in_silence():
            from inspect_ai import eval as run_task

            return run_task(
                make_task(rows, partial(self._ask, known), samples=self.samples),
                model=self.model,
                model_base_url=self.base_url,
                log_dir=str(self.log_dir),
                log_format="eval",
                log_samples=True,
                log_realtime=False,
                log_level="notset",
                display="none",
                score_display=False,
                ctl_server=False,
                fail_on_error=True,
                max_samples=self.concurrency,
            )

    async def _ask(self, known: "_Asked", prompt: str, draw: int | None) -> Reply:
        from inspect_ai.model import CachePolicy, GenerateConfig, get_model

        config = GenerateConfig(
            max_tokens=self.max_tokens,
            max_connections=self.concurrency,
            max_retries=self.retries,
            attempt_timeout=self.timeout,
            temperature=0.0 if draw is None else 1.0,
            logprobs=True if draw is None else None,
            top_logprobs=ALTERNATIVES if draw is None else None,
        )
        # Without a number of its own, each draw would be served the first one's kept answer.
        scopes = {} if draw is None else {"draw": str(draw)}
        cache = CachePolicy(scopes=scopes) if self.cache else False
        try:
            output = await get_model().generate(prompt, config=config, cache=cache)
        except Exception as error:
            status = _find_status(error)
            if status in REFUSED:
                await self._check_taken(known)
                return Reply(text=f"(refused, {status})")
            known.failures.append(explain_status(status) or f"it cannot be asked ({_name(error)})")
            raise
        known.taken = True
        if not output.choices:
            return Reply(text="(a reply without choices)")
        logprobs = output.choices[0].logprobs
        return Reply(text=output.completion, tokens=logprobs.content if logprobs else ())

    async def _check_taken(self, known: "_Asked") -> None:
        """After a refusal, tell a model that takes nothing from one that minds what it read."""
        import anyio  # that of inspect_ai, whose loop may be another than asyncio's
        from inspect_ai.model import GenerateConfig, get_model

        known.checking = known.checking or anyio.Lock()
        async with known.checking:
            if known.refusal is not None:
                raise known.refusal
            if known.taken:
                return
            config = GenerateConfig(
                max_tokens=self.max_tokens, max_retries=self.retries, attempt_timeout=self.timeout
            )
            try:
                await get_model().generate(PLAIN, config=config, cache=False)
            except Exception as error:
                status, said = _find_status(error), " ".join(str(error).split())[:MOST_SAID]
                what = "refuses every" if status in REFUSED else "fails on a plain"
                known.failures.append(f"it {what} request ({status or _name(error)}: {said})")
                known.refusal = error
                raise
            known.taken = True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What is missing on this machine, as one kind of error and in plain words."""
        try:
            yield
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in _EXTRA:
                raise
            raise JudgeUnavailableError(
                f"judge inspect/{self.model}: {error.name} is not installed; "
                "pip install 'emlens-interp[inspect]'",
                {},
            ) from error
        except Exception as error:
            # Its errors that need no traceback, marked up for a terminal.
            if type(error).__name__ != "PrerequisiteError":
                raise
            from rich.text import Text

            said = " ".join(Text.from_markup(str(error)).plain.split())
            raise JudgeUnavailableError(f"judge inspect/{self.model}: {said}", {}) from error


class _Asked:
    """What is learnt of a model while rows are judged."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        """Why requests failed for good."""
        self.taken = False
        """Whether any request was."""
        self.refusal: Exception | None = None
        self.checking: Any = None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _find_status(error: BaseException) -> int | None:
    """The status that an endpoint ended with, under the names that providers' clients give it."""
    found = (getattr(one, name, None) for one in _chain(error) for name in ("status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _name(error: BaseException) -> str:
    """What an error came from, without anything of the request."""
    return type(list(_chain(error))[-1]).__name__


def _describe(model: Any) -> Any:
    """What a judge's id holds of its model: all that decides an answer and can be named."""
    if isinstance(model, str):
        return model
    settings = model.config.model_dump(mode="json", exclude_none=True, exclude=_RUNNING)
    plain = (str, int, float, bool, type(None))
    arguments = {
        name: value if isinstance(value, plain) else type(value).__name__
        for name, value in model.model_args.items()
    }
    return [str(model), model.api.base_url, settings, arguments]


@contextmanager
def _in_silence() -> Iterator[None]:
    """Let a run of inspect_ai print nothing, and the process be afterwards as it was before.

    It draws on rich's one console even if it is told to show nothing, and takes over all logging.
    """
    import rich

    root, console = logging.getLogger(), rich.get_console()
    handlers, level, settings = root.handlers[:], root.level, dict(vars(console))
    console.quiet = True
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        console.__dict__ = settings
