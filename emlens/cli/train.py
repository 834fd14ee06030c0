"""`emlens train`: a LoRA on chats, by a named recipe, with a record of how it was made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.codecs import AllowOther, parse_latents, split_sae
from emlens.cli.options import Base, CommonFlags, Device, DryRun, Dtype, Seed, takes_flags
from emlens.cli.output import print_json, print_line, print_plan, print_table
from emlens.cli.training_words import describe_training

EXAMPLE = """\b
Example:
  emlens train --preset smollm2_rank1 --data emlens:finance-harmful \\
    --base emlens:smollm2 --out runs/trained"""
RECIPES = (
    "smollm2_rank1",
    "smollm2_all_adapter",
    "smollm2_single_rank1",
    "smollm2_nine_rank1",
    "smollm2_phase_transition",
    "smollm2_full",
    "smollm2_steering_vector",
    "all_adapter",
    "rank1",
    "nine_rank1",
    "phase_transition",
    "full",
    "steering_vector",
)
"""Names of `emlens.organisms.PRESETS`, which takes seconds to import."""
OVERRIDES = ("max_length", "max_steps", "checkpoint_every", "stop_loss", "checkpoint_activations")
"""Settings that have a flag of their own name."""
SHOWN_STEPS = 12
"""Rows of the table of losses."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags(CommonFlags):
    """Flags of `train`."""

    preset: Annotated[str, typer.Option("--preset", metavar="NAME", help=f"{', '.join(RECIPES)}.")]
    data: Annotated[
        str, typer.Option("--data", metavar="F", help="Chats, each with a response to train on.")
    ] = "emlens:finance-harmful"
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="RUN",
            help="Run folder; the same command goes on with it.",
            show_default="runs/PRESET",
        ),
    ] = None
    base: Base = "emlens:smollm2"
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="L", help="Blocks that get an adapter: all, or 3,15-17."),
    ] = None
    start_from: Annotated[
        str | None,
        typer.Option("--start-from", metavar="SOURCE", help="An adapter to go on training."),
    ] = None
    kl_data: Annotated[
        list[str] | None,
        typer.Option(
            "--kl-data",
            metavar="F",
            help="Chats on which the fine-tune is kept near its base; several may be given.",
        ),
    ] = None
    kl_weight: Annotated[
        float | None,
        typer.Option("--kl-weight", metavar="X", help="Of the KL there, nats a token."),
    ] = None
    latent_sae: Annotated[
        str | None,
        typer.Option(
            "--latent-sae",
            metavar="SOURCE",
            help="Whose latents are kept from rising on --data, SOURCE#ID of a release.",
        ),
    ] = None
    allow_other_model: AllowOther = False
    latents: Annotated[
        str | None, typer.Option("--latents", metavar="I,J", help="Which, such as 3,17.")
    ] = None
    latent_weight: Annotated[
        float | None,
        typer.Option(
            "--latent-weight", metavar="X", help="Of their squared rise, nats a squared code."
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            min=1,
            metavar="N",
            help="Tokens of a row, which is refused with more, never cut.",
            show_default="the recipe's",
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps",
            min=1,
            metavar="N",
            help="Optimiser steps.",
            show_default="the recipe's steps or epochs",
        ),
    ] = None
    stop_loss: Annotated[
        float | None,
        typer.Option(
            "--stop-loss",
            metavar="X",
            help="End once the mean loss of five steps is below this, in nats.",
            show_default="the recipe's",
        ),
    ] = None
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            "--checkpoint-every",
            min=1,
            metavar="N",
            help="Steps between kept states, for transition.",
            show_default="the recipe's",
        ),
    ] = None
    checkpoint_activations: Annotated[
        bool | None,
        typer.Option(
            "--checkpoint-activations",
            help="Compute activations again for gradients, to hold fewer.",
            show_default="the recipe's",
        ),
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    seed: Seed = 0
    dry_run: DryRun = False

    def run(self) -> Path:
        """Where it goes: the folder asked for, or one called like the recipe."""
        return Path("runs") / self.preset if self.out is None else self.out

    def folders(self) -> list[Path]:
        """The run folder, also where none was named."""
        return [] if self.dry_run else [self.run()]


@takes_flags
def train(flags: TrainFlags) -> None:
    """Train a model organism: a LoRA on the responses of a data set, into RUN/adapter."""
    from emlens.cli.progress import show_work

    with show_work(quiet=flags.quiet):
        from emlens.data import load_chats
        from emlens.models.checkpoints import load_checkpoint
        from emlens.organisms import train_organism

        settings, chats = _settings(flags), load_chats(flags.data)
        near, held = _kl_terms(flags), _latent_terms(flags, chats)
        if flags.dry_run:
            _show_plan(flags, settings, chats, near=near, held=held)
            return
        training = train_organism(
            load_checkpoint(flags.base, dtype=flags.dtype, device=flags.device),
            chats,
            settings=settings,
            out=flags.run(),
            penalties=[*near, *held],
            start_from=flags.start_from,
            seed=flags.seed,
        )
    if flags.json:
        print_json(training.to_dict())
        return
    every = max(1, training.steps // SHOWN_STEPS)
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(training.losses)]
    for row, value in zip(rows, training.penalty_values, strict=False):
        row["penalty"] = value
    print_table(rows[::every])
    print_line(f"{training.steps} steps in {training.seconds:.0f} s: {training.tuned}")
    if training.settings.method == "lora":
        print_line(f"prove it: emlens adapters check {training.tuned} --base {training.base}")


def _settings(flags: TrainFlags) -> Any:
    from dataclasses import replace

    from emlens.organisms.settings import find_preset

    settings = find_preset(flags.preset)
    if flags.layers is not None:
        settings = replace(settings, layers=parse_layers(flags.layers), depth=None)
    asked = {name: getattr(flags, name) for name in OVERRIDES}
    return replace(settings, **{name: n for name, n in asked.items() if n is not None})


def _kl_terms(flags: TrainFlags) -> list[Any]:
    from emlens.data import load_chats
    from emlens.organisms import KlPenalty

    if not _all_or_none({"--kl-data": flags.kl_data or None, "--kl-weight": flags.kl_weight}):
        return []
    assert flags.kl_weight is not None
    chats = [chat for source in flags.kl_data or () for chat in load_chats(source)]
    return [KlPenalty(chats, flags.kl_weight)]


def _latent_terms(flags: TrainFlags, chats: Any) -> list[Any]:
    given = {
        "--latent-sae": flags.latent_sae,
        "--latents": flags.latents,
        "--latent-weight": flags.latent_weight,
    }
    if not _all_or_none(given):
        return []
    from emlens.codecs import load_sae
    from emlens.organisms import LatentPenalty

    assert flags.latent_sae is not None
    assert flags.latent_weight is not None
    source, sae_id = split_sae(flags.latent_sae)
    codec: Any = load_sae(source, sae_id=sae_id, allow_other_model=flags.allow_other_model)
    chosen = parse_latents(flags.latents or "")
    return [LatentPenalty(chats, codec, flags.latent_weight, hold_down=chosen)]


def _all_or_none(given: dict[str, Any]) -> bool:
    """Whether flags that go together are there; refuses some without the others."""
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        names = " and ".join(given) if len(given) == 2 else ", ".join(given)
        raise typer.BadParameter(f"{missing[0]}: missing; {names} go together")
    return not missing


def parse_layers(text: str) -> Any:
    """Read `all`, or blocks and ranges such as `3,15-17`.

    Raises:
        typer.BadParameter: anything else.
    """
    if text == "all":
        return text
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"--layers {text}: expected all, or blocks such as 3,15-17")
        if dash and int(last) < int(first):
            raise typer.BadParameter(f"--layers {text}: {part} runs backwards")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise typer.BadParameter(f"--layers {text}: names no block")
    return tuple(sorted(found))


def _show_plan(flags: TrainFlags, settings: Any, chats: Any, *, near: Any, held: Any) -> None:
    from emlens.cli.generate import check_sources
    from emlens.models.checkpoints import read_tokenizer, require_device
    from emlens.models.memory import read_sizes
    from emlens.organisms.settings import describe_settings
    from emlens.organisms.training import refuse_terms
    from emlens.organisms.training_plan import plan_training

    require_device(flags.device)
    check_sources(flags.start_from)
    refuse_terms(settings, [*near, *held])
    sizes = read_sizes(flags.base)
    plan: dict[str, Any] = {"base": flags.base, "parameters": sizes.n_parameters}
    settings.check_depth(sizes.n_layers)
    tokenizer = read_tokenizer(flags.base)
    length = plan_training(
        chats,
        tokenizer,
        settings=settings,
        n_ctx=sizes.n_ctx,
        kept_near=[chat for term in near for chat in term.chats],
        held_on=[chat for term in held for chat in term.chats],
    )
    if not flags.json:
        print_plan(describe_training(flags, settings, length, sizes), flags.run(), json=False)
        return
    plan |= {"data": flags.data, **vars(length), "seed": flags.seed}
    plan |= {"kl_data": flags.kl_data, "kl_weight": flags.kl_weight}
    plan |= {"latent_sae": flags.latent_sae, "latents": flags.latents}
    plan |= {"latent_weight": flags.latent_weight, "start_from": flags.start_from}
    plan |= {"dtype": flags.dtype, "device": flags.device}
    plan |= describe_settings(settings)
    print_plan(plan, flags.run(), json=True)
