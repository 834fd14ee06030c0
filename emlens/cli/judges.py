"""Judges by name, such as `contrast` or `openai/MODEL`, and what they would cost."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.options import CommonFlags

KINDS = ("contrast", "local/SOURCE", "openai/MODEL", "inspect/MODEL")
LOGS = "inspect"
"""Folder in RUN for the logs of inspect_ai."""
KEY_ENV = "OPENAI_API_KEY"
"""Variable of the key of openai/MODEL where none is named."""
CHARACTERS_A_TOKEN = 4
"""A rule of thumb for English; the endpoint's own tokenizer is not known."""
ANSWER_CHARACTERS = 4
"""What is assumed of each new token of a response that is not there yet."""
COHERENCE_READS = 3
"""Texts of a response that the contrast judge reads for its coherence: as it is, with its words
shuffled, and behind another question."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(CommonFlags):
    """Flags that choose a judge."""

    judge: Annotated[str, typer.Option("--judge", metavar="NAME", help=f"{', '.join(KINDS)}.")] = (
        "contrast"
    )
    judge_base_url: Annotated[
        str | None,
        typer.Option(
            "--judge-base-url", metavar="URL", help="Endpoint of openai/MODEL or inspect/MODEL."
        ),
    ] = None
    judge_key_env: Annotated[
        str,
        typer.Option(
            "--judge-key-env",
            metavar="NAME",
            help="Variable that holds the key of openai/MODEL; '' for no key.",
        ),
    ] = KEY_ENV
    judge_price: Annotated[
        float | None,
        typer.Option(
            "--judge-price", metavar="X", help="Of a million prompt tokens, for --dry-run."
        ),
    ] = None

    judge_report: Annotated[
        Path | None,
        typer.Option(
            "--judge-report",
            metavar="FOLDER",
            help="What scripts/measure_judge.py --save found of this judge: what it may claim.",
        ),
    ] = None

    def judge_source(self) -> str | None:
        """The model that judges, where it is one that is loaded here and not the base."""
        kind, _, name = self.judge.partition("/")
        return name if kind == "local" else None


def check_judge(flags: Any) -> None:
    """Refuse a judge that there is not, or whose key is missing, before anything is loaded.

    A dry run, which may be made to learn the price, says what of the key in its plan instead.

    Args:
        flags: as for `load_judge`.

    Raises:
        typer.BadParameter: an unknown name, a kind without its model, or without its extra.
        ValueError: no key for an endpoint, or the report of another judge.
        JudgeUnavailableError: inspect_ai finds no key or provider.
    """
    check_name(flags.judge)
    kind, _, name = flags.judge.partition("/")
    if flags.judge_report is not None and kind == "contrast":
        raise typer.BadParameter(
            "--judge-report: the contrast judge keeps what was measured of it in its calibration"
        )
    _read_report(flags)  # one that is not there is told in a dry run too
    if getattr(flags, "dry_run", False):
        return
    if kind == "openai":
        _load_api(flags, name)
    if kind == "inspect":
        _load_inspect(flags, name).judge(())


def check_name(name: str) -> None:
    """Refuse the name of a judge that there is not.

    Raises:
        typer.BadParameter: an unknown name, a kind without its model, or without its extra.
    """
    kind, slash, rest = name.partition("/")
    if name == "contrast" or (kind in ("local", "openai") and slash and rest):
        return
    if kind == "inspect" and "/" in rest.strip("/"):
        if importlib.util.find_spec("inspect_ai") is None:
            raise typer.BadParameter(
                f"--judge {name}: inspect_ai is not installed; pip install 'emlens-interp[inspect]'"
            )
        return
    raise typer.BadParameter(f"--judge {name}: expected {', '.join(KINDS)}")


def load_judge(flags: Any, *, base: Any = None, runs: Sequence[Path] = ()) -> Any:
    """The judge that flags name.

    Args:
        flags: `JudgeOptions` with `out`, `base`, `dtype`, `device` and `batch_tokens`.
        base: the base of the command where it is loaded already; nothing that acts on a fine-tune
            of it acts on it.
        runs: what a judge of theirs was fitted to is used again.
    """
    from emlens.data import Batching
    from emlens.models.loading import load_base

    check_name(flags.judge)
    kind, _, name = flags.judge.partition("/")
    if kind == "openai":
        return _load_api(flags, name)
    if kind == "inspect":
        return _load_inspect(flags, name)
    batching = Batching(flags.batch_tokens)
    if kind == "local":
        from emlens.evaluation import LocalJudge

        known = base if base is not None and name == flags.base else None
        model = known or load_base(name, dtype=flags.dtype, device=flags.device)
        return LocalJudge(model, batching=batching, report=_read_report(flags))
    from emlens.evaluation import ContrastJudge

    if base is None:
        base = load_base(flags.base, dtype=flags.dtype, device=flags.device)
    return ContrastJudge.calibrated(base, batching=batching, runs=runs)


def _load_api(flags: Any, model: str) -> Any:
    from emlens.evaluation import ApiJudge

    where = {} if flags.judge_base_url is None else {"base_url": flags.judge_base_url}
    report = _read_report(flags)
    return ApiJudge(model=model, key_env=flags.judge_key_env, report=report, **where)


def _read_report(flags: Any) -> Any:
    folder = getattr(flags, "judge_report", None)
    if folder is None:
        return None
    from emlens.artifacts import read_result
    from emlens.evaluation import JudgeReport

    return read_result(folder, JudgeReport)


def _load_inspect(flags: Any, model: str) -> Any:
    from emlens.evaluation import InspectJudge

    if flags.judge_key_env != KEY_ENV:
        raise typer.BadParameter(
            f"--judge-key-env {flags.judge_key_env}: inspect_ai looks for each provider's key in "
            "that provider's own variable; set that one and leave the flag out"
        )
    return InspectJudge(
        model=model,
        base_url=flags.judge_base_url,
        log_dir=flags.out / LOGS,
        report=_read_report(flags),
    )


def _say_key(name: str) -> str:
    if not name:
        return "none is sent"
    return f"{name} is {'set' if os.environ.get(name) else 'not set, and is needed'}"


def _say_inspect_key(flags: Any, model: str) -> str:
    """What inspect_ai says of the provider and its key; nothing is asked of it."""
    from emlens.evaluation.judges import JudgeUnavailableError

    try:
        _load_inspect(flags, model).judge(())
    except JudgeUnavailableError as error:
        return f"missing, and is needed ({error})"
    return "found, or none is needed"


def count_instructions(questions: Any, samples: int) -> int:
    """Characters of what a judge is told about all responses to questions, their own prompts too.

    Args:
        questions: what is asked.
        samples: of a wording, where the question does not say.
    """
    from emlens.studies.asked import count_responses

    return sum(
        count_responses([question], samples) * measure_instructions(question.judge_prompts)
        for question in questions
    )


def measure_instructions(own: Mapping[str, str]) -> int:
    """Characters of what a judge is told about one response, a question's own prompts first."""
    from emlens.evaluation.judge_prompts import PROMPTS

    return sum(len(own.get(name, shipped)) for name, shipped in PROMPTS.items())


def plan_judging(
    flags: Any, *, responses: int, characters: int, instructions: int
) -> dict[str, Any]:
    """What judging would take, as fields of a plan; tokens are estimated from characters.

    Args:
        flags: `JudgeOptions` with `out`.
        responses: to be judged.
        characters: of all questions and answers.
        instructions: characters of what a judge that reads instructions is told, for all responses.
    """
    from emlens.evaluation.judge_prompts import PROMPTS

    kind, _, model = flags.judge.partition("/")
    plan: dict[str, Any] = {"judge": flags.judge}
    read = instructions + len(PROMPTS) * characters
    if kind == "contrast":
        from emlens.evaluation.contrast_judge import PROMPT_PAIRS

        told = [text for pair in PROMPT_PAIRS for text in (pair.careful, pair.harmful)]
        read = sum(map(len, told)) * responses + (len(told) + COHERENCE_READS) * characters
    tokens = read // CHARACTERS_A_TOKEN
    if kind not in ("openai", "inspect"):
        return plan | {"judge_prompt_tokens": tokens}
    from emlens.evaluation import ApiJudge, InspectJudge

    if kind == "openai":
        samples = ApiJudge.samples
        plan["judge_endpoint"] = flags.judge_base_url or ApiJudge.base_url
        plan["judge_key"] = _say_key(flags.judge_key_env)
    else:
        samples = InspectJudge.samples
        plan |= {"judge_model": model, "judge_logs": str(flags.out / LOGS)}
        plan["judge_key"] = _say_inspect_key(flags, model)
        plan["judge_endpoint"] = flags.judge_base_url or "as its provider has it"
    plan |= {"judge_requests": len(PROMPTS) * responses, "judge_prompt_tokens": tokens}
    # Where log-probabilities do not serve, answers are drawn for each score besides.
    plan["judge_requests_at_most"] = len(PROMPTS) * responses * (1 + samples)
    price = flags.judge_price
    if price is None:
        return plan | {"judge_cost": "give --judge-price for money"}
    cost = tokens * price / 1e6
    return plan | {
        "judge_cost": round(cost, 4),
        "judge_cost_at_most": round(cost * (1 + samples), 4),
    }
