"""The flags that several commands share, each with one meaning; a command's own are beside it."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Base = Annotated[str, typer.Option("--base", metavar="SOURCE", help="The base model.")]
MaybeBase = Annotated[
    str | None, typer.Option("--base", metavar="SOURCE", help="The base model.", show_default=False)
]
Tuned = Annotated[
    list[str],
    typer.Option("--tuned", metavar="SOURCE", help="Adapter or checkpoint; may be given again."),
]
MaybeTuned = Annotated[
    str | None, typer.Option("--tuned", metavar="SOURCE", help="An adapter of that base.")
]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale",
        metavar="X|MODULE=X",
        help="Factor on an adapter's strength, or on one module's; may be given again.",
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites", metavar="SITE", help="Stream or site, such as resid_post or mlp_out.3; again."
    ),
]
Positions = Annotated[
    list[str] | None,
    typer.Option(
        "--positions",
        metavar="SPAN",
        help="prompt, response, all or last_prompt, with a slice as in response[:5]; again.",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Of the weights: auto, float32, bfloat16, float16, float64.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Tokens run at once, all models counted.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything drawn at random.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="RUN", help="Run folder; the same command goes on with it."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done.")
]


def _remember(context: Any, parameter: Any, value: bool) -> bool:
    # One dictionary for all nested contexts, so that whoever shows an error finds it there.
    context.meta[f"emlens.{parameter.name}"] = value
    return value


def _go_offline(context: Any, parameter: Any, value: bool) -> bool:
    if value:
        # Read when the Hub's library is first imported, which no command has done yet.
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_remember, is_eager=True, help="Print one JSON object and nothing else."
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", callback=_remember, is_eager=True, help="No progress, short errors."),
]
Offline = Annotated[
    bool, typer.Option("--offline", callback=_go_offline, is_eager=True, help="Ask no network.")
]


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """The flags that every command has."""

    json: Json = False
    quiet: Quiet = False
    offline: Offline = False

    def folders(self) -> list[Path]:
        """Where the command keeps what it has finished; none for one that only prints."""
        out = getattr(self, "out", None)
        dry = getattr(self, "dry_run", False)
        return [] if out is None or dry else [Path(out)]


Flags = TypeVar("Flags", bound=CommonFlags)


def takes_flags(function: Callable[[Flags], None]) -> Callable[..., None]:
    """Make a command of a function of one dataclass, each field of which becomes a flag.

    Fields are annotated as typer asks for it; a command's own come before the common ones.
    """
    (flags,) = (hint for name, hint in get_type_hints(function).items() if name != "return")
    hints = get_type_hints(flags, include_extras=True)
    common = {field.name for field in fields(CommonFlags)}

    @functools.wraps(function)
    def command(*, typer_context: Any, **values: Any) -> None:
        given = flags(**values)
        # For whoever has to say what an interrupted command leaves.
        typer_context.meta["emlens.flags"] = given
        function(given)

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in sorted(
            fields(flags), key=lambda field: (field.name in common, field.default is not MISSING)
        )
    ]
    parameters.insert(
        0,
        inspect.Parameter(
            "typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
        ),
    )
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    del command.__wrapped__  # typer would read the signature of the function inside
    return command


def parse_scale(values: list[str] | None) -> float | dict[str, float]:
    """Read `--scale`: one number, or MODULE=X for each module named.

    Raises:
        typer.BadParameter: anything else.
    """
    if not values:
        return 1.0
    if len(values) == 1 and "=" not in values[0]:
        return _parse_factor(values[0], values[0])
    factors: dict[str, float] = {}
    for value in values:
        module, equals, number = value.rpartition("=")
        if not equals or not module:
            raise typer.BadParameter(f"--scale {value}: expected MODULE=X, or one X alone")
        if module in factors:
            raise typer.BadParameter(f"--scale {value}: {module} was already given a factor")
        factors[module] = _parse_factor(number, value)
    return factors


def _parse_factor(number: str, value: str) -> float:
    try:
        factor = float(number)
    except ValueError:
        raise typer.BadParameter(f"--scale {value}: {number!r} is not a number") from None
    if factor - factor != 0:
        raise typer.BadParameter(f"--scale {value}: expected a finite number")
    return factor


def parse_numbers(flag: str, text: str, *, whole: bool = False) -> tuple[float, ...]:
    """Read numbers with commas between them, as in `--scales 1,5,10`.

    Args:
        flag: named in errors.
        text: what was given.
        whole: take whole numbers only.

    Raises:
        typer.BadParameter: anything else, or a number below or at 0.
    """
    kind = "whole numbers" if whole else "numbers"
    found: list[float] = []
    for part in text.split(","):
        try:
            number = float(int(part) if whole else float(part))
        except ValueError:
            raise typer.BadParameter(
                f"{flag} {text}: {part.strip()!r} is not one of the {kind} expected, such as 1,5,10"
            ) from None
        if not 0 < number < float("inf"):
            raise typer.BadParameter(f"{flag} {text}: {part.strip()} is not above 0 and finite")
        found.append(number)
    return tuple(found)
