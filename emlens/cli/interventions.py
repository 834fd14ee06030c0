"""`--add`, `--ablate`, `--at`, `--positions`: directions in files, as interventions on a model."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Add = Annotated[
    list[str] | None,
    typer.Option(
        "--add",
        metavar="FILE[@SITE]:COEF:UNITS",
        help="Add a saved direction; units raw, delta_norm or resid_norm; again.",
    ),
]
Ablate = Annotated[
    list[str] | None,
    typer.Option("--ablate", metavar="FILE[@SITE]", help="Take a saved direction out; again."),
]
At = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="site|writes|SITE",
        help="Where --ablate acts: each direction's own site, every write to the residual "
        "stream, or sites such as resid_post; again.",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--positions",
        metavar="SPAN",
        help="Tokens that --add and --ablate act on: all (the default), prompt, response or "
        "last_prompt, with a slice as in response[:5].",
    ),
]
AllowOther = Annotated[
    bool,
    typer.Option(
        "--allow-other-model", help="Use directions of another model, fine-tune or tokenizer."
    ),
]
UNITS = ("raw", "delta_norm", "resid_norm")


@dataclass(frozen=True)
class DirectionFile:
    """A saved direction, or all of a file's, each at its own site."""

    path: Path
    site: str | None

    def load(self) -> Any:
        """The `Direction` asked for, or the file's `Directions`."""
        from emlens.results import load_result
        from emlens.vectors import Direction, Directions

        found = load_result(self.path)
        if not isinstance(found, Direction | Directions):
            raise typer.BadParameter(f"{self.path} holds a {found.kind}, expected directions")
        if self.site is None:
            return found
        own = Directions(directions=(found,)) if isinstance(found, Direction) else found
        return own[self.site]

    def load_with_controls(self) -> Any:
        """The `Directions` asked for: of one site too, with the random ones made beside it."""
        from emlens.vectors import Direction, Directions

        found = DirectionFile(self.path, None).load()
        if isinstance(found, Direction):
            found = Directions(directions=(found,))
        if self.site is None:
            return found
        place = found.index(self.site)
        names = ("covariance_matched", "shuffled", "top3_share")
        tensors = {name: getattr(found, name) for name in names}
        return dataclasses.replace(
            found,
            directions=(found.directions[place],),
            **{n: None if t is None else t[place : place + 1] for n, t in tensors.items()},
        )


def parse_direction(text: str) -> DirectionFile:
    """Read FILE or FILE@SITE; a file whose own name holds an @ is found as it is."""
    if Path(text).exists():
        return DirectionFile(Path(text), None)
    path, at, site = text.rpartition("@")
    if not at:
        return DirectionFile(Path(text), None)
    if not path or not site:
        raise typer.BadParameter(
            f"{text}: expected FILE or FILE@SITE, such as runs/d@resid_post.14"
        )
    return DirectionFile(Path(path), site)


@dataclass(frozen=True)
class Addition:
    """What one `--add` asks for."""

    file: DirectionFile
    coefficient: float
    units: Any


def parse_addition(text: str) -> Addition:
    """Read FILE[@SITE]:COEF:UNITS.

    Raises:
        typer.BadParameter: a part is missing or is not what it should be.
    """
    parts = text.rsplit(":", 2)
    if len(parts) != 3:
        raise typer.BadParameter(
            f"--add {text}: expected FILE[@SITE]:COEF:UNITS, such as runs/d@resid_post.14:2:raw; "
            f"units are {', '.join(UNITS)}, and none is assumed"
        )
    file, number, units = parts
    if units not in UNITS:
        raise typer.BadParameter(f"--add {text}: units {units!r}, expected {', '.join(UNITS)}")
    try:
        coefficient = float(number)
    except ValueError:
        raise typer.BadParameter(f"--add {text}: {number!r} is not a number") from None
    if coefficient - coefficient != 0:
        raise typer.BadParameter(f"--add {text}: expected a finite coefficient")
    return Addition(parse_direction(file), coefficient, units)


def parse_at(values: Sequence[str] | None) -> Any:
    """Read `--at`: `site` or `writes` alone, or sites."""
    if not values:
        raise typer.BadParameter(
            "--ablate needs --at: 'site' (each direction's own), 'writes' (everything that is "
            "written to the residual stream), or sites such as resid_post; these are different "
            "experiments, and none is assumed"
        )
    named = {"site", "writes"} & set(values)
    if named and len(values) > 1:
        raise typer.BadParameter(f"--at {sorted(named)[0]}: stands alone, or name sites only")
    return values[0] if named else tuple(values)


def read_interventions(
    add: Sequence[str] | None,
    ablate: Sequence[str] | None,
    at: Sequence[str] | None,
    *,
    positions: str | None = None,
    allow_other_model: bool,
) -> tuple[Any, ...]:
    """Turn the flags into interventions, additions after ablations.

    Raises:
        typer.BadParameter: flags that do not say what is to be done.
        PositionsError: positions that do not follow the grammar.
        ArtifactError: a file that holds no result.
    """
    if at and not ablate:
        raise typer.BadParameter("--at says where --ablate acts, and there is no --ablate")
    if positions and not (add or ablate):
        raise typer.BadParameter(
            "--positions says on what --add and --ablate act; neither is given"
        )
    additions = [parse_addition(text) for text in add or ()]
    where: Any = parse_at(at) if ablate else None
    if not additions and not ablate:
        return ()
    from emlens.interventions import ablate_direction, add_direction

    made: list[Any] = []
    alike: Any = {"positions": positions or "all", "allow_other_model": allow_other_model}
    for text in ablate or ():
        found = parse_direction(text).load()
        made += ablate_direction(found, at=where, **alike)
    for addition in additions:
        found = addition.file.load()
        for direction in [found] if found.kind == "direction" else found:
            made += add_direction(
                direction,
                coefficient=addition.coefficient,
                units=addition.units,
                **alike,
            )
    return tuple(made)
