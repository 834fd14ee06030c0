"""What must be known before any latent of a search is believed, in sentences; nothing is run."""

from collections.abc import Iterator, Sequence

from emlens.features import FeatureContrast, FeatureDiff
from emlens.features.cards import FeatureCards
from emlens.features.screen_results import SIDES, FeatureScreen
from emlens.numerics.sign_flips import smallest_p
from emlens.studies.plain_difference import PlainDifference


def list_cautions(
    diffs: Sequence[FeatureDiff],
    plain: Sequence[PlainDifference | None],
    contrast: FeatureContrast | None,
    screen: FeatureScreen | None,
    *,
    cards: FeatureCards | None = None,
    domains: Sequence[str] = (),
) -> tuple[str, ...]:
    """Sentences, the worst first: a codec that is blind, units that are none, chance.

    Args:
        diffs: those with the behaviour first.
        plain: what needs no codec, in the same order; None of a fine-tune that does not differ.
        contrast: with careful twins; None where there are none.
        screen: of the causes; None where there is none.
        cards: of what latents may mean; None where there are none.
        domains: of each pair of the contrast; empty where nobody knows.
    """
    found = [line for diff in diffs for line in diff.health.cautions]
    parts = {"at the fixed responses of the screen": screen, "on the texts of the cards": cards}
    found += [
        f"{where}: {line}"
        for where, part in parts.items()
        if part is not None
        for line in part.health.cautions
        if line not in found
    ]
    found += [line for diff, own in zip(diffs, plain, strict=True) for line in _compare(diff, own)]
    found += _judge_units(diffs, contrast, domains)
    found += [] if screen is None else _judge_effects(screen)
    if screen is not None and screen.n_shared_prompts:
        found.append(
            f"{screen.n_shared_prompts} of {screen.n_prompts} prompts of the sampled stage are "
            "those of the fixed responses: latents were chosen and judged on the same"
        )
    if screen is not None and screen.favours_latents:
        found.append(
            "sampled stage: a smaller share of the latents than of the random directions went on; "
            "the better chosen ones beat the others more often than their p says"
        )
    return tuple(dict.fromkeys(found))


def _compare(diff: FeatureDiff, plain: PlainDifference | None) -> Iterator[str]:
    share, mean = diff.health.captured_share, 0.0 if plain is None else plain.vectors[0].captured
    if share is not None and share < mean:
        yield (
            f"{diff.tuned}: all latents together capture {share:.2f} of the squared change, and "
            f"one plain direction, the mean difference, {mean:.2f}"
        )
    if diff.why_untested:
        yield f"{diff.tuned}: no latent was tested: {diff.why_untested}"


def _judge_effects(screen: FeatureScreen) -> Iterator[str]:
    """Where steering with the mean difference does as much as steering with the best latent."""
    for side, words in zip(SIDES, ("added to the base", "taken from the fine-tune"), strict=True):
        curve, best = screen.mean_difference_curve(side), float(screen.forced_effect(side).max())
        if curve is not None and float(curve.max()) >= best:
            yield (
                f"{words}, no latent does more than the mean difference, which needs no codec: "
                f"{best:+.3f} against {float(curve.max()):+.3f} nats a token"
            )


def _judge_units(
    diffs: Sequence[FeatureDiff], contrast: FeatureContrast | None, domains: Sequence[str]
) -> Iterator[str]:
    if contrast is None:
        yield (
            "there is no careful twin: p-values say that models differ on these prompts, as they "
            "do after any fine-tune, and nothing of harm"
        )
    elif not contrast.can_find:
        yield (
            f"{contrast.n_pairs} {'pair' if contrast.n_pairs == 1 else 'pairs'} of fine-tunes: no "
            f"p-value of so few falls below {contrast.smallest_p:.3g}, so that the contrast orders "
            "latents and proves none"
        )
    if contrast is not None and 0 < (n := len(set(domains))) < contrast.n_pairs:
        yield (
            f"{contrast.n_pairs} pairs of {n} {'domain' if n == 1 else 'domains'}: q-values take "
            "them as independent, and those of one domain share its rows; over domains the "
            f"smallest p is {smallest_p(n):.3g}"
        )
    if diffs[0].responses == "own":
        yield (
            "each model read its own responses: a difference of texts mixes with one of "
            "representations"
        )
