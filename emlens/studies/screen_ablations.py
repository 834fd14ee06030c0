"""Many directions taken out of one model, one after the other: which do harm, and which matter?

Nothing is sampled, so that every control can be tried; the median and the strongest of a kind are
those to sample and judge (`remove_direction`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.data import Chat, ContrastTexts
from emlens.interventions import ablate_direction
from emlens.interventions.from_directions import At
from emlens.models.pair import ModelPair
from emlens.studies.effects import measure_kl, measure_odds
from emlens.vectors import Direction


@dataclass(frozen=True, kw_only=True)
class ScreenedAblation:
    """One direction taken out."""

    group: str
    """What kind of direction, as the caller named it."""
    number: int
    """Its place in the group."""
    site: str
    """Where it was estimated."""
    kl: float
    """KL(model || without it) on the neutral text, nats a token."""
    odds: float
    """log p(positive) - log p(negative) of the fixed texts without it, nats a token."""


@dataclass(frozen=True, kw_only=True)
class AblationScreen(Result):
    """Every direction of every group, taken out of the same model."""

    kind: ClassVar[str] = "ablation_screen"

    model: str
    odds_before: float
    """Of the model as it is."""
    ablations: tuple[ScreenedAblation, ...]

    def group(self, name: str) -> tuple[ScreenedAblation, ...]:
        """The ablations of one group, in order.

        Raises:
            KeyError: no such group; those that exist are named.
        """
        found = tuple(one for one in self.ablations if one.group == name)
        if not found:
            groups = sorted({one.group for one in self.ablations})
            raise KeyError(f"group: there is no {name!r}; expected one of {', '.join(groups)}")
        return found

    def with_kl_near(
        self, kl: float, *, group: str, factor: float = 1.25
    ) -> tuple[ScreenedAblation, ...]:
        """Ablations of a group that disturb neutral text as much as another does.

        Args:
            kl: that of the other, nats a token.
            group: whose.
            factor: the larger of the two over the smaller, at most.
        """
        return tuple(
            one
            for one in self.group(group)
            if one.kl > 0 and kl > 0 and abs(math.log(one.kl / kl)) <= math.log(factor)
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row an ablation, with the change of the odds."""
        return [
            asdict(one) | {"odds_change": one.odds - self.odds_before} for one in self.ablations
        ]


def find_median(ablations: Sequence[ScreenedAblation]) -> ScreenedAblation:
    """The ablation with the median odds; of an even number, the lower of the middle two."""
    odds = statistics.median_low(one.odds for one in ablations)
    return next(one for one in ablations if one.odds == odds)


def find_strongest(ablations: Sequence[ScreenedAblation]) -> ScreenedAblation:
    """The ablation that leaves the positive texts least likely."""
    return min(ablations, key=lambda one: one.odds)


def choose_ablation(
    ablations: Sequence[ScreenedAblation], *, max_kl: int | float
) -> ScreenedAblation:
    """The strongest of those at a bearable cost; where there is none, the one with the lowest KL.

    Args:
        ablations: one or more, such as an estimate at several sites.
        max_kl: what an ablation may cost on the neutral text, nats a token.

    Source: Arditi et al. 2024, arXiv 2406.11717, appendix C, without the score of adding.
    """
    able = [one for one in ablations if one.kl <= max_kl]
    return find_strongest(able) if able else min(ablations, key=lambda one: one.kl)


def screen_ablations(
    pair: ModelPair,
    groups: Mapping[str, Sequence[Direction]],
    *,
    at: At,
    texts: ContrastTexts,
    neutral: Sequence[Chat],
) -> AblationScreen:
    """Take each direction out of the fine-tune, alone, and look at fixed text.

    Args:
        pair: base and fine-tune; directions are taken out of the fine-tune.
        groups: name -> directions, such as an estimate and its controls.
        at: where, as for `ablate_direction`.
        texts: answered chats, misaligned (positive) and aligned, that the odds are about.
        neutral: answered chats that have nothing to do with the behaviour.

    Raises:
        ValueError: no direction at all.

    Source: Arditi et al. 2024, arXiv 2406.11717, appendix C (bypass score and KL); differs: odds
        of whole fixed responses instead of one token's.
    """
    given = [(name, i, one) for name, some in groups.items() for i, one in enumerate(some)]
    if not given:
        raise ValueError("groups: got no direction, expected at least one")
    found = []
    for name, number, direction in given:
        out = ablate_direction(direction, at=at)
        found.append(
            ScreenedAblation(
                group=name,
                number=number,
                site=str(direction.site),
                kl=measure_kl(pair.base, pair.tuned, out, neutral),
                odds=measure_odds(pair.tuned, out, texts),
            )
        )
    return AblationScreen(
        model=pair.tuned_name,
        odds_before=measure_odds(pair.tuned, (), texts),
        ablations=tuple(found),
    )
