"""`--sae SOURCE[#SAE_ID]` and what goes with it: a codec, and models that it is used on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from emlens.cli.options import (
    Base,
    BatchTokens,
    CommonFlags,
    Device,
    DryRun,
    Dtype,
    Scale,
    Seed,
    parse_scale,
)

Sae = Annotated[
    str,
    typer.Option(
        "--sae",
        metavar="SOURCE[#SAE_ID]",
        help="Autoencoder: shipped, a folder, a run of sae train, on the Hub, or a release.",
    ),
]
Span = Annotated[
    str | None,
    typer.Option(
        "--positions",
        metavar="SPAN",
        help="Tokens that are counted, such as response or all[8:].",
        show_default="those it was trained on",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Read only that many chats.")]
AllowOther = Annotated[
    bool,
    typer.Option(
        "--allow-other-model", help="Use an autoencoder of other weights than the base's."
    ),
]
Latents = Annotated[
    str | None, typer.Option("--latents", metavar="I,J", help="Which, such as 3,17.")
]


@dataclass(frozen=True, kw_only=True)
class CodecFlags(CommonFlags):
    """Flags of every command that reads a model through a codec."""

    sae: Sae
    allow_other_model: AllowOther = False
    base: Base = "emlens:smollm2"
    scale: Scale = None
    seed: Seed = 0
    dtype: Dtype = "auto"
    device: Device = "auto"
    batch_tokens: BatchTokens = 16384
    dry_run: DryRun = False


@dataclass(frozen=True, kw_only=True)
class PromptCodecFlags(CodecFlags):
    """Flags of every such command that reads prompts; a screen has fixed responses instead."""

    positions: Span = None
    limit: Limit = None


def load_codec(flags: Any) -> Any:
    """The codec that `--sae` names, on the device of the models.

    Args:
        flags: with `sae`, `allow_other_model` and `device`.

    Raises:
        CodecError: there is none, or none that is supported.
    """
    from emlens.codecs import load_sae

    source, sae_id = split_sae(flags.sae)
    return load_sae(
        source, sae_id=sae_id, device=flags.device, allow_other_model=flags.allow_other_model
    )


def split_sae(text: str) -> tuple[str | Path, str | None]:
    """Read SOURCE or SOURCE#SAE_ID; a run of `sae train` is the codec that lies in it."""
    place = Path(text).expanduser()
    if place.exists():  # a # may be part of its name
        trained = place / "results" / "codec"
        return (trained if trained.is_dir() else text), None
    source, mark, sae_id = text.partition("#")
    if mark and not (source and sae_id):
        raise typer.BadParameter(f"--sae {text}: expected SOURCE#SAE_ID, or SOURCE without a #")
    return source, sae_id or None


def plan_codec(flags: Any, latents: Sequence[int] | None = None) -> dict[str, Any]:
    """What a dry run says of the codec; read, and held against the base, where it is at hand.

    Args:
        flags: those of a codec, and `base`.
        latents: which of it are asked for; None for all.

    Raises:
        CodecError: it does not fit, or does not have the latents.
    """
    from emlens.codecs import check_fits
    from emlens.features.steering import check_latents
    from emlens.models.memory import read_sizes
    from emlens.sources import SHIPPED_PREFIX

    source, sae_id = split_sae(flags.sae)
    plan: dict[str, Any] = {"sae": flags.sae}
    local = Path(source).expanduser().exists() or str(source).startswith(SHIPPED_PREFIX)
    if sae_id is not None or not local:
        return plan | {"site": "known once it is downloaded"}
    codec = load_codec(flags)
    check_fits(codec, read_sizes(flags.base))
    if latents is not None:
        check_latents(codec, latents)
    plan |= {"architecture": codec.architecture, "site": str(codec.site), "d_sae": codec.d_sae}
    if isinstance(flags, PromptCodecFlags):
        plan["positions"] = flags.positions or codec.positions
    return plan


def load_base_of(flags: Any) -> Any:
    """The base."""
    from emlens.models.loading import load_base

    return load_base(flags.base, dtype=flags.dtype, device=flags.device)


def scale_tuned(flags: Any, source: str) -> Any:
    """A fine-tune as `--scale` asks for it: its source, or an adapter of another strength.

    Raises:
        typer.BadParameter: a scale for a full checkpoint.
    """
    if not flags.scale:
        return source
    from emlens.models.adapter_files import load_adapter
    from emlens.models.lora import scale_adapter
    from emlens.models.pair import is_adapter

    if not is_adapter(source):
        raise typer.BadParameter(f"--scale is a factor on an adapter, and {source} is none")
    return scale_adapter(load_adapter(source), parse_scale(flags.scale))


def parse_latents(text: str) -> tuple[int, ...]:
    """Read latents such as `3,17`.

    Raises:
        typer.BadParameter: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--latents {text}: expected numbers such as 3,17")
    return tuple(int(part) for part in parts)


def parse_strengths(flag: str, text: str) -> tuple[float, ...]:
    """Read strengths such as `-1,0.5,1`, on either side of 0.

    Raises:
        typer.BadParameter: anything else.
    """
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            raise typer.BadParameter(
                f"{flag} {text}: {part.strip()!r} is no number; expected such as -1,0.5,1"
            ) from None
        found.append(number)
    return tuple(found)


def choose_listed(
    latents: str | None, run: Path | None, *, top: int | None, usual: int
) -> tuple[int, ...]:
    """The latents of `--latents`, or the first of what a run found.

    Args:
        latents: as given.
        run: of `features find` or `features compare`.
        top: how many of a run's.
        usual: how many where nobody says; all where the run holds fewer.

    Raises:
        typer.BadParameter: both, neither, a run that found none, or more than it holds.
    """
    if (latents is None) == (run is None):
        raise typer.BadParameter("--latents, --from: expected one of them")
    if latents is not None:
        if top is not None:
            raise typer.BadParameter("--top: counts latents of --from, and --latents names them")
        return parse_latents(latents)
    assert run is not None
    found = _list_latents(run)
    if top is not None and top > len(found):
        raise typer.BadParameter(f"--top {top}: {run} holds {len(found)} latents")
    return found[: usual if top is None else top]


def _list_latents(run: Path) -> tuple[int, ...]:
    """The latents that a search chose, or all of a comparison, the largest changes first."""
    from emlens.features import FeatureDiff, rank_features
    from emlens.results import load_result
    from emlens.runs import RunFolder

    folder = RunFolder.open(run)
    for name in ("features", "01"):
        if folder.has_result(name):
            found = load_result(folder.result_folder(name))
            if isinstance(found, FeatureDiff):
                return tuple(rank_features(found, by="abs_delta").latents.tolist())
            return tuple(int(row["latent"]) for row in found.rows())
    raise typer.BadParameter(f"--from {run}: is no finished run of features find or compare")


def keep_result(run: Path, plan: Mapping[str, Any], make: Any, cls: Any) -> Any:
    """A result in a run folder of its own: read if it is there, else made and saved.

    Args:
        run: the folder.
        plan: all that decides the result.
        make: makes it.
        cls: its class.

    Raises:
        PlanChangedError: the folder holds a run of another plan.
    """
    from emlens.runs import RunFolder
    from emlens.studies.stages import Stages

    folder = RunFolder.check(run, plan)
    if folder.has_result(cls.kind):
        return folder.read_result(cls.kind, cls)
    return Stages(RunFolder.start(run, plan)).keep(cls.kind, cls, make)
