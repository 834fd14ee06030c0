"""Searches among latents laid out: tables that can be sorted, cards with their windows.

From JSON alone; what stands alone, such as one comparison, has the parts that it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from emlens.reports.blocks import Plot, Plots
from emlens.reports.document import kind_of
from emlens.reports.feature_figures import (
    plot_models,
    plot_overview,
    plot_screen,
    plot_steering,
    plot_warning,
)
from emlens.reports.features import (
    TITLES,
    WHOLE,
    list_alarms,
    list_notes,
    name_search,
    say_fit_of_warning,
    say_sampled,
    say_trials,
)
from emlens.reports.sections import Json
from emlens.reports.tokens import find_level
from emlens.reports.visible import (
    NOT_TESTED,
    finite,
    read_number,
    show_number,
    show_p,
    show_running,
)

_LINK = "https://"
"""What an address must begin with to become a link: no other scheme runs or sends anything."""
_FIT = ("explained_variance", "l0", "dead_share")
SHOWN_ROWS = 50
"""Rows of a table of latents."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table that can be sorted."""

    text: str
    value: float | None
    """What it is sorted by; None of a text, and of a number that there is not."""
    number: bool
    target: str | None = None
    """Id of the card that it leads to."""


@dataclass(frozen=True, kw_only=True)
class SortTable:
    """A table whose columns can be sorted."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    numbers: list[bool]
    """Whether each column is of numbers."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token of a window."""

    text: str
    level: int | None
    """Shade from 0 to 10; None where the autoencoder does not look."""
    says: str
    """Its codes."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some tokens around one at which a latent is active."""

    pieces: list[Piece]
    says: str
    """How active it is there, in each model."""


@dataclass(frozen=True, kw_only=True)
class CardBlock:
    """One latent."""

    id: str
    latent: int
    feature: Json | None
    """What a search says of it."""
    card: Json | None
    """What a corpus says of it."""
    link: str | None
    top: list[Window]
    sampled: list[Window]
    plots: list[tuple[str, Plot]]
    """A caption and a figure."""


@dataclass(frozen=True, kw_only=True)
class FeatureBlock:
    """One search, or one part of one."""

    heading: str
    document: Json
    whole: Json | None
    """The document, where it is a whole search."""
    alarms: list[str] = field(default_factory=list)
    """What must be known first."""
    notes: list[str] = field(default_factory=list)
    """What is said beside the tables."""
    trials: SortTable | None = None
    """What a screen tried, and what of it counts."""
    trial_notes: list[str] = field(default_factory=list)
    health: list[Json] = field(default_factory=list)
    overview: tuple[str, Plot] | None = None
    tables: list[SortTable] = field(default_factory=list)
    warnings: list[tuple[str, Plot]] = field(default_factory=list)
    """What each says, and its figure."""
    cards: list[CardBlock] = field(default_factory=list)


def make_feature_blocks(documents: Sequence[Json], plots: Plots) -> list[FeatureBlock]:
    """Lay out searches, and parts that stand alone: how well a codec fits first, in one table."""
    fits = [one for one in documents if kind_of(one) == "sae_health"]
    by_base: dict[str, list[Json]] = {}
    for one in fits:
        # What the base did on one text stands once; on another text it did something else.
        base = (show_number(one["rows"][0][name]) for name in ("n_tokens", *_FIT))
        key = (one["base_fingerprint"], one["codec_fingerprint"], *base)
        by_base.setdefault(str(key), []).append(one)
    first = [_fit_block(some) for some in by_base.values()]
    return first + [make_feature_block(one, plots) for one in documents if one not in fits]


def _fit_block(fits: Sequence[Json]) -> FeatureBlock:
    alarms = dict.fromkeys(line for one in fits for line in list_alarms(one))
    heading = name_search(fits[0]) if len(fits) == 1 else TITLES["sae_health"]
    return FeatureBlock(
        heading=heading, document=fits[0], whole=None, alarms=list(alarms), health=list(fits)
    )


def make_feature_block(document: Json, plots: Plots) -> FeatureBlock:
    """Lay out a search among latents, or a part of one that stands alone."""
    kind, heading = kind_of(document), name_search(document)
    if kind == WHOLE:
        return _whole_block(document, plots)
    shared: dict[str, Any] = {
        **{"heading": heading, "document": document, "whole": None},
        **{"alarms": list_alarms(document), "notes": list_notes(document)},
        "health": [document["health"]] if document.get("health") else [],
    }
    if kind == "feature_cards":
        made = [
            _card_block(int(c["latent"]), plots, card=c, of=document) for c in document["cards"]
        ]
        return FeatureBlock(**shared, cards=made)
    if kind == "early_warning":
        return FeatureBlock(**shared, warnings=[_warning(document, plots)])
    table = make_table(TITLES[kind], document["rows"][:SHOWN_ROWS])
    if kind == "feature_screen":
        says = "largest effect of each latent; lines: what the strongest random direction reaches"
        overview = (says, plots.add(plot_screen(document), says))
        cards = [_card_block(int(latent), plots, screen=document) for latent in document["latents"]]
        return FeatureBlock(
            **shared, **_tried(document), overview=overview, tables=[table], cards=cards
        )
    return FeatureBlock(**shared, tables=[table])


def _whole_block(document: Json, plots: Plots) -> FeatureBlock:
    known = {int(c["latent"]): c for c in (document["cards"] or {"cards": []})["cards"]}
    screened = document["screen"]
    says = "the largest change need not be what acts"
    if screened is not None:
        says += "; lines: what the strongest random direction of the same length reaches"
    # Drawn first, so that it has the first number.
    overview = (says, plots.add(plot_overview(document), says)) if document["features"] else None
    by_latent = {int(one["latent"]): one for one in document["features"]}
    blocks = [
        _card_block(
            latent,
            plots,
            card=card,
            of=document["cards"],
            feature=by_latent.get(latent),
            screen=screened,
        )
        for latent, card in known.items()
    ]
    targets = {block.latent: block.id for block in blocks}
    return FeatureBlock(
        heading=name_search(document),
        document=document,
        whole=document,
        alarms=list_alarms(document),
        **({} if screened is None else _tried(screened)),
        health=list(document["health"]),
        overview=overview,
        tables=[make_table("Latents", document["rows"], targets=targets)],
        warnings=[_warning(one, plots) for one in document["warnings"]],
        cards=blocks,
    )


def _tried(screen: Json) -> dict[str, Any]:
    """What a screen tried and what of it counts; reports of old do not hold it."""
    rows = screen.get("trials", ())
    columns = (
        [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    )
    shown = [{name: row[name] for name in columns} for row in rows]
    return {"trials": make_table("What was tried", shown), "trial_notes": say_trials(screen)}


def make_table(
    title: str, rows: Sequence[Json], *, targets: dict[int, str] | None = None
) -> SortTable:
    """A table of rows with equal keys, in columns that can be sorted.

    Args:
        title: its caption.
        rows: as a result lists them.
        targets: latent -> id of its card, to which the latent's cell leads.
    """
    columns = list(rows[0]) if rows else []
    cells = [[_cell(name, row[name], targets or {}) for name in columns] for row in rows]
    numbers = [
        all(row[k].number or row[k].text in _NOTHING for row in cells) for k in range(len(columns))
    ]
    names = [name.replace("_", " ") for name in columns]
    return SortTable(title=title, columns=names, rows=cells, numbers=numbers)


_NOTHING = ("–", NOT_TESTED)


def _is_test(name: str) -> bool:
    """Whether a column is of p- or q-values."""
    return name in ("p", "p_value", "q_value") or name.endswith("_p")


def _cell(name: str, value: Any, targets: dict[int, str]) -> Cell:
    if _is_test(name) and show_p(value) == NOT_TESTED:
        return Cell(text=NOT_TESTED, value=None, number=False)
    if value is None:
        return Cell(text="–", value=None, number=False)
    if isinstance(value, bool) or not _is_number(value):
        return Cell(text=str(value), value=None, number=False)
    if name == "latent":
        number = int(value)
        target = targets.get(number)
        return Cell(text=str(number), value=float(number), number=True, target=target)
    text = str(value) if isinstance(value, int) else show_number(value)
    return Cell(text=text, value=finite(value), number=True)


def _is_number(value: Any) -> bool:
    try:
        read_number(value)
    except TypeError:
        return False
    return True


def _card_block(
    latent: int,
    plots: Plots,
    *,
    card: Json | None = None,
    of: Json | None = None,
    feature: Json | None = None,
    screen: Json | None = None,
) -> CardBlock:
    figures = []
    if feature is not None:
        says = "mean code in the base (open) and in each fine-tune (filled)"
        figures.append((says, plots.add(plot_models(feature), f"latent {latent}: {says}")))
    if screen is not None and latent in [int(n) for n in screen["latents"]]:
        n = len(screen["curves"]["base"]["controls"])
        says = f"what steering does; shaded: {n} random directions of the same length"
        if screen["curves"]["base"].get("mean_difference") is not None:
            says = f"{says}; dashed: the mean difference of the models"
        if sampled := say_sampled(screen, latent):
            says = f"{says}. Sampled, {'; '.join(sampled)}"
        figures.append((says, plots.add(plot_steering(screen, latent), f"latent {latent}: {says}")))
    link = None if card is None or card["link"] is None else str(card["link"])
    models = [] if of is None else [str(name) for name in of["models"]]
    windows = {"top": [], "sampled": []} if card is None else _list_windows(card, models)
    return CardBlock(
        id=f"card-{plots.number()}",
        latent=latent,
        feature=feature,
        card=card,
        link=link if link is not None and link.startswith(_LINK) else None,
        top=windows["top"],
        sampled=windows["sampled"],
        plots=figures,
    )


def _list_windows(card: Json, models: Sequence[str]) -> dict[str, list[Window]]:
    """Windows of a card on one scale, whose end is the largest code of all of them."""
    every = [*card["top"], *card["sampled"]]
    cap = max((read_number(one["code"]) for one in every), default=1.0)
    return {name: [_window(one, models, cap) for one in card[name]] for name in ("top", "sampled")}


def _window(window: Json, models: Sequence[str], cap: float) -> Window:
    columns = list(zip(*window["codes"], strict=True))
    at = int(window["token"]) - int(window["start"])
    pieces = [
        _piece(str(text), codes, models, cap)
        for text, codes in zip(window["pieces"], columns, strict=True)
    ]
    decile = window["decile"]
    part = "" if decile is None else f"tenth {decile} of 10: "
    return Window(pieces=pieces, says=part + _say_codes(columns[at], models))


def _piece(text: str, codes: Sequence[Any], models: Sequence[str], cap: float) -> Piece:
    numbers = [read_number(code) for code in codes if code is not None]
    level = find_level(max(numbers), cap) if numbers and cap > 0 else None
    return Piece(text=show_running(text), level=level, says=_say_codes(codes, models))


def _say_codes(codes: Sequence[Any], models: Sequence[str]) -> str:
    return ", ".join(
        f"{name} {show_number(code)}" for name, code in zip(models, codes, strict=True)
    )


def _warning(document: Json, plots: Plots) -> tuple[str, Plot]:
    says = f"{document['latent']}: {document['verdict']}; {say_fit_of_warning(document)}"
    return says, plots.add(plot_warning(document), says)
