"""`emlens generate`: responses of a model, a fine-tune of it, or either under interventions."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from emlens.cli.interventions import Ablate, Add, AllowOther, At, Where, read_interventions
from emlens.cli.options import (
    Base,
    BatchTokens,
    CommonFlags,
    Device,
    DryRun,
    Dtype,
    MaybeTuned,
    Out,
    Scale,
    Seed,
    parse_scale,
    takes_flags,
)
from emlens.cli.output import print_json, print_line, print_plan

EXAMPLE = """\b
Example:
  emlens generate --base emlens:smollm2 --tuned emlens:reckless-finance \\
    --prompts emlens:open-questions --samples 4 --temperature 0.7 \\
    --top-p 0.95 --max-new-tokens 64 --out runs/answers"""
SHOWN = 8
"""Responses printed."""

Samples = Annotated[int, typer.Option("--samples", min=1, help="Responses to each prompt.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Share of probability sampled from.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest response, in tokens.")
]


def samples_option(usual: int) -> Any:
    """`--samples` of a command that asks questions, which may say themselves how often.

    Args:
        usual: what holds where neither they nor the command say so.
    """
    return typer.Option(
        "--samples",
        min=1,
        help="Answers to each wording, over what the questions say.",
        show_default=f"what the questions say, else {usual}",
    )


@dataclass(frozen=True, kw_only=True)
class ModelFlags(CommonFlags):
    """Which model a command runs, and what is done to it meanwhile."""

    base: Base = "emlens:smollm2"
    scale: Scale = None
    add: Add = None
    ablate: Ablate = None
    at: At = None
    positions: Where = None
    allow_other_model: AllowOther = False
    dtype: Dtype = "auto"
    device: Device = "auto"
    dry_run: DryRun = False

    def interventions(self) -> tuple[Any, ...]:
        """What `--add` and `--ablate` ask for."""
        return read_interventions(
            self.add,
            self.ablate,
            self.at,
            positions=self.positions,
            allow_other_model=self.allow_other_model,
        )


def read_factor(scale: list[str] | None, tuned: Any) -> float | dict[str, float]:
    """What `--scale` asks for.

    Args:
        scale: as given.
        tuned: what it would act on; None or nothing if there is no fine-tune.

    Raises:
        typer.BadParameter: no number, or nothing that it could act on.
    """
    if scale and not tuned:
        raise typer.BadParameter("--scale is a factor on an adapter, and there is no --tuned")
    return parse_scale(scale)


def check_sources(*sources: str | None) -> None:
    """Find each source without loading it, as a dry run does; None is skipped.

    Of a model nothing but its configuration is fetched; an adapter that is here is read.

    Raises:
        SourceError: there is no such source.
        ValueError: an adapter that cannot be read.
    """
    from emlens.models.adapter_files import load_adapter
    from emlens.sources import locate_source, parse_source

    configs = ["config.json", "adapter_config.json"]
    for source in filter(None, sources):
        found = locate_source(parse_source(source), allow_patterns=configs)
        if (found / "adapter_config.json").is_file() and list(found.glob("adapter_model.*")):
            load_adapter(source, allow_noop=True)


def load_for(flags: Any, tuned: str | None, *, base: Any = None) -> Any:
    """The base, or the base with a fine-tune of it attached or in its place.

    Args:
        flags: with `base`, `scale`, `dtype` and `device`.
        tuned: an adapter or a full checkpoint; None is the base itself.
        base: where it is loaded already; its weights are shared.
    """
    from emlens.models.adapter_files import load_adapter
    from emlens.models.loading import load_base
    from emlens.models.lora import scale_adapter
    from emlens.models.pair import is_adapter, load_pair

    given: Any = tuned
    if flags.scale and tuned is not None:
        if not is_adapter(tuned):
            raise typer.BadParameter(f"--scale is a factor on an adapter, and {tuned} is none")
        given = scale_adapter(load_adapter(tuned), parse_scale(flags.scale))
    if base is None:
        base = load_base(flags.base, dtype=flags.dtype, device=flags.device)
    return base if tuned is None else load_pair(base, given).tuned


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags):
    """Flags of `generate`."""

    prompts: Annotated[str, typer.Option("--prompts", metavar="F", help="Chats to be answered.")]
    out: Out
    tuned: MaybeTuned = None
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Answer only that many chats.")
    ] = None
    samples: Samples = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 600
    seed: Seed = 0
    batch_tokens: BatchTokens = 16384


@takes_flags
def generate(flags: GenerateFlags) -> None:
    """Sample responses, under interventions if any are given, and save them."""
    from emlens.cli.progress import show_work

    read_factor(flags.scale, flags.tuned)
    with show_work(quiet=flags.quiet):
        from emlens.data import Batching, load_chats
        from emlens.studies import sample_responses

        chats = load_chats(flags.prompts, limit=flags.limit)
        interventions = flags.interventions()
        if flags.dry_run:
            check_sources(flags.base, flags.tuned)
            _show_plan(flags, len(chats))
            return
        responses = sample_responses(
            load_for(flags, flags.tuned),
            chats,
            sampling=read_sampling(flags),
            interventions=interventions,
            out=flags.out,
            batching=Batching(flags.batch_tokens),
        )
    if flags.json:
        print_json(responses.to_dict())
        return
    for response in responses.responses[:SHOWN]:
        print_line(f"{response.prompt}\n  {response.text}\n")
    print_line(f"{len(responses.responses)} responses: {flags.out}")


def read_questions(flags: Any, source: str) -> Any:
    """Questions, each with as many answers as its file says unless `--samples` does.

    Args:
        flags: with `samples`, None where it was not given.
        source: of the questions.
    """
    from emlens.evaluation import load_questions

    questions = load_questions(source)
    if flags.samples is None:
        return questions
    return tuple(replace(question, samples_per_paraphrase=None) for question in questions)


def plan_asking(flags: Any, base: str, questions: Any, *, times: int) -> dict[str, Any]:
    """What sampling would take, as fields of a plan.

    Args:
        flags: those that `read_sampling` reads.
        base: whose tokenizer counts the prompts; without one they are not counted.
        questions: what is asked.
        times: models, or states of one, that are asked all of it.
    """
    from emlens.models.checkpoints import read_tokenizer
    from emlens.studies.asked import count_prompt_tokens, count_responses

    samples, tokenizer = read_sampling(flags).n, read_tokenizer(base)
    plan: dict[str, Any] = {"responses": times * count_responses(questions, samples)}
    if tokenizer is not None:
        plan["prompt_tokens"] = times * count_prompt_tokens(questions, samples, tokenizer=tokenizer)
    plan["new_tokens_at_most"] = plan["responses"] * flags.max_new_tokens
    return plan


def read_sampling(flags: Any) -> Any:
    """The `Sampling` that the flags `samples`, `temperature`, `top_p` and the like ask for."""
    from emlens.models.sampling import Sampling

    return Sampling(
        n=flags.USUAL_SAMPLES if flags.samples is None else flags.samples,
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
    )


def _show_plan(flags: GenerateFlags, n_chats: int) -> None:
    plan = {
        "base": flags.base,
        "tuned": flags.tuned,
        "add": flags.add,
        "ablate": flags.ablate,
        "at": flags.at,
        "positions": flags.positions,
        "prompts": n_chats,
        "responses": n_chats * flags.samples,
        "sampling": vars(read_sampling(flags)),
    }
    print_plan(plan, flags.out, json=flags.json)
