"""`emlens features screen`: do latents cause the behaviour, beside random directions?"""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.codecs import (
    CodecFlags,
    Latents,
    choose_listed,
    load_base_of,
    load_codec,
    plan_codec,
    scale_tuned,
)
from emlens.cli.feature_compare import describe, write_page
from emlens.cli.feature_plain import keep_plain, print_plain
from emlens.cli.feature_texts import (
    From,
    Negative,
    Positive,
    Questions,
    Sampled,
    Strengths,
    Top,
    Units,
    plan_screen,
    print_fit,
    print_judged,
    read_contrast,
    read_screen,
)
from emlens.cli.generate import MaxNewTokens, Samples, Temperature, TopP, check_sources
from emlens.cli.judges import (
    ANSWER_CHARACTERS,
    JudgeOptions,
    check_judge,
    load_judge,
    measure_instructions,
    plan_judging,
)
from emlens.cli.options import Out, takes_flags
from emlens.cli.output import print_json, print_line, print_plan, print_table

SCREEN_EXAMPLE = """\b
Example:
  emlens features screen --sae emlens:smollm2-resid15 \\
    --tuned emlens:reckless-finance --latents 3,17 --strengths 1,2 \\
    --units delta_norm --out runs/screen"""
FORCED = (
    *("side", "latent", "forced_effect", "forced_strength", "forced_p"),
    *("controls_median", "controls_max", "mean_difference"),
)
"""Columns of the first stage in the rows of a screen."""


@dataclass(frozen=True, kw_only=True)
class ScreenFlags(JudgeOptions, CodecFlags):
    """Flags of `features screen`."""

    tuned: Annotated[str, typer.Option("--tuned", metavar="SOURCE", help="Adapter or checkpoint.")]
    strengths: Strengths
    out: Out
    latents: Latents = None
    source: From = None
    top: Top = None
    units: Units = None
    positive: Positive = None
    negative: Negative = None
    sampled: Sampled = 0
    questions: Questions = None
    samples: Samples = 1
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    max_new_tokens: MaxNewTokens = 100


@takes_flags
def screen(flags: ScreenFlags) -> None:
    """Add latents to the base and take them from the fine-tune, beside random directions.

    First by the odds of fixed misaligned against aligned responses, all latents; then, with
    --sampled, by judged responses of the best, with the share of incoherent ones.
    """
    from emlens.cli.progress import show_work

    if flags.sampled:
        check_judge(flags)
    with show_work(quiet=flags.quiet):
        latents = choose_listed(flags.latents, flags.source, top=flags.top, usual=20)
        contrast, settings = read_contrast(flags), read_screen(flags)
        if flags.dry_run:
            _show_plan(flags, latents, contrast, settings)
            return
        found, plain = _screen(flags, latents, contrast, settings)
    if flags.json:
        said = {"trials": found.trials(), "plain": [describe(one) for one in plain]}
        print_json({**found.to_dict(), **said})
        return
    print_fit([found.health])
    print_plain(plain)
    rows = [{name: row[name] for name in FORCED} for row in found.rows()]
    print_table(rows, title="fixed responses, effects in nats a token")
    print_judged(found)
    print_line(f"one {found.units} is {found.unit_norm:.4g}; report: {flags.out / 'report.html'}")


def _screen(
    flags: ScreenFlags, latents: Any, contrast: Any, settings: Any
) -> tuple[Any, list[Any]]:
    from emlens.evaluation.calibration import keep_calibration
    from emlens.features import screen_features
    from emlens.features.steering import check_latents
    from emlens.models.pair import load_pair
    from emlens.runs import RunFolder
    from emlens.studies import judge_scores
    from emlens.studies.judge_scores import unscored

    codec = load_codec(flags)
    check_latents(codec, latents)
    base = load_base_of(flags)
    # A run that is gone on with keeps what its judge was fitted to.
    judge = load_judge(flags, base=base, runs=[flags.out]) if flags.sampled else None
    pair = load_pair(base, scale_tuned(flags, flags.tuned))
    named = {"kind": "screen_run", "judge": None if judge is None else judge.id}
    run = RunFolder.start(flags.out, named | {"codec": codec.fingerprint})
    if judge is not None:
        keep_calibration(run.path, judge)
    found = screen_features(
        pair,
        codec,
        latents=latents,
        texts=contrast,
        scores=unscored() if judge is None else judge_scores(judge, contrast),
        settings=settings,
        out=run.path / "screen",
    )
    run.save_result(found.kind, found)
    texts = (*contrast.positive, *contrast.negative)
    given: dict[str, Any] = {"read": found.health, "batch_tokens": flags.batch_tokens}
    plain = keep_plain(flags.out, lambda: pair, texts, **given)
    write_page([found, *plain], flags.out)
    return found, plain


def _show_plan(flags: ScreenFlags, latents: Any, contrast: Any, settings: Any) -> None:
    check_sources(flags.base, flags.tuned)
    plan = plan_codec(flags, latents) | {
        "base": flags.base,
        "tuned": flags.tuned,
        "latents": list(latents),
    }
    plan |= plan_screen(settings, len(latents), contrast)
    if n := plan["sampled_responses"]:
        characters = n * ANSWER_CHARACTERS * flags.max_new_tokens
        plan |= plan_judging(
            flags, responses=n, characters=characters, instructions=n * measure_instructions({})
        )
    print_plan(plan, flags.out, json=flags.json)
