"""Searches among latents as a report words them, from their JSON alone; figures are elsewhere.

`feature_figures` draws, `feature_blocks` lays out.
"""

from collections.abc import Mapping
from types import MappingProxyType

from emlens.reports.document import kind_of
from emlens.reports.sections import Json, short_name
from emlens.reports.visible import finite, read_number, show_change, show_number, show_p, show_share

WHOLE = "persona_features"
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "feature_diff": "Latents compared",
        "feature_contrast": "Harmful fine-tunes less their careful twins",
        "model_classification": "Fine-tunes told apart by latents",
        "feature_screen": "Latents steered",
        "feature_cards": "Cards of latents",
        "sae_health": "How well the autoencoder fits",
        "plain_difference": "What differs without any autoencoder",
        "early_warning": "Early warning",
        "feature_ranking": "Latents in order",
        "latent_codes": "Codes of some latents",
    }
)
"""What a part of a search is called where it stands alone."""
SIDES = ("base", "tuned")
DONE = ("added to the base", "taken from the fine-tune")
"""What is done with a latent on each side."""


def name_search(document: Json) -> str:
    """Whose latents, of which fine-tunes."""
    kind = kind_of(document)
    if kind == WHOLE:
        tuned = [str(one["tuned"]) for one in document["models"] if one["misaligned"]]
    else:
        tuned = [str(document["tuned"])] if document.get("tuned") else []
    names = [short_name(name) for name in tuned]
    who = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    what = short_name(str(document["codec"])) if document.get("codec") else ""
    title = TITLES.get(kind, kind)
    if not what:
        return f"{title}: {who}" if who else title
    return f"{who} in latents of {what}" if who else f"latents of {what}"


def say_features(document: Json) -> list[str]:
    """The sentence about a whole search; none about its parts."""
    if kind_of(document) != WHOLE:
        return []
    clauses = [_say_tested(document), _say_strongest(document), _say_captured(document)]
    clauses += [_say_area(document)] if document["classification"] is not None else []
    return [f"{name_search(document)}: {'; '.join(clause for clause in clauses if clause)}"]


def say_health(health: Json) -> str:
    """Explained variance of each model."""
    names = [
        "the base" if name == "base" else short_name(str(health["tuned"] or health["base"]))
        for name in health["streams"]
    ]
    values = [show_number(value, 2) for value in health["explained_variance"]]
    return ", ".join(f"{value} in {name}" for name, value in zip(names, values, strict=True))


def say_interval(interval: Json) -> str:
    """A number with its limits."""
    value, low, high = (show_number(interval[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def say_sampled(screen: Json, latent: int) -> list[str]:
    """What sampled responses say of a latent, one clause a side; none where none were sampled."""
    curves = [one for one in screen["sampled"] if one["latent"] == latent]
    return [
        f"{words}: {_say_curve(curve)}"
        for side, words in zip(SIDES, DONE, strict=True)
        for curve in curves
        if curve["side"] == side
    ]


def _plainly(screen: Json, side: str) -> list[Json]:
    """What sampled responses say of the mean difference; reports of old do not hold it."""
    return [one for one in screen.get("sampled_plainly", ()) if one["side"] == side]


def _say_effect(curve: Json) -> str:
    if curve["chosen"] is None:
        return "incoherent at every strength"
    effect = curve["points"][curve["chosen"]]["effect"]
    return "on too few prompts" if effect is None else say_interval(effect)


def _say_curve(curve: Json) -> str:
    p = f"p = {show_p(curve['p'])}"
    if curve["chosen"] is None:
        return f"too many incoherent responses at every strength, {p}"
    point, said = curve["points"][curve["chosen"]], _say_effect(curve)
    return (
        f"effect on the score {said} at strength {show_number(point['strength'])}, "
        f"{show_share(point['incoherent'])} incoherent, {p}"
    )


def strongest_control(screen: Json, side: str) -> float | None:
    """The largest effect of a random direction on one side, at its own best strength."""
    found = [finite(row["controls_max"]) for row in screen["rows"] if row["side"] == side]
    return found[0] if found else None


def _say_tested(document: Json) -> str:
    first = document["models"][0]
    if not first["n_tested"]:
        return f"no latent was tested ({first['why_untested']})"
    return (
        f"{first['n_significant']} of {first['n_tested']} latents tested differ in "
        f"{short_name(str(first['tuned']))} (q up to .05), as latents do after any fine-tune"
    )


def _say_strongest(document: Json) -> str:
    screen = document["screen"]
    if screen is None:
        return "nothing was asked of their effect"
    clauses = []
    for side, words in zip(SIDES, ("added to the base", "taken out"), strict=True):
        rows = [row for row in screen["rows"] if row["side"] == side]
        if not rows:
            continue
        best = max(rows, key=lambda row: read_number(row["forced_effect"]))
        clauses.append(
            f"{words}, latent {best['latent']} does most: "
            f"{show_change(best['forced_effect'])} nats a token, random directions up to "
            f"{show_change(best['controls_max'])} (p = {show_p(best['forced_p'])})"
            f"{_say_judged(rows, screen, side)}"
        )
    return ", ".join(clauses)


def _say_judged(rows: list[Json], screen: Json, side: str) -> str:
    judged = [row for row in rows if row["effect"] is not None]
    if not judged:
        return ""
    best = max(judged, key=lambda row: read_number(row["effect"]))
    low, high = show_number(best["effect_low"]), show_number(best["effect_high"])
    return (
        f" and of those sampled latent {best['latent']}: effect on the score "
        f"{show_change(best['effect'])} [{low}, {high}] (p = {show_p(best['p'])})"
        + "".join(f", the mean difference {_say_effect(one)}" for one in _plainly(screen, side))
    )


def _say_captured(document: Json) -> str:
    health = document["health"][0]
    plain = next((one for one in document["plain"] if one["tuned"] == health["tuned"]), None)
    if health["captured_share"] is None or plain is None:
        return ""
    return (
        f"all latents together capture {show_share(health['captured_share'])} of the squared "
        f"change, the mean difference alone {show_share(plain['vectors'][0]['captured'])}"
    )


def _say_area(document: Json) -> str:
    found = document["classification"]
    return (
        f"{found['claim']}: area {say_interval(found['auc'])}, by mean differences alone "
        f"{say_interval(found['by_mean_difference']['auc'])}"
    )


def list_alarms(document: Json) -> list[str]:
    """What must be known before a search, or a part of one that stands alone, is believed."""
    if kind_of(document) == WHOLE:
        return [str(line) for line in document["cautions"]]
    health = document if kind_of(document) == "sae_health" else document.get("health")
    if health is not None:
        # Reports of old hold no sentences.
        return [str(line) for line in health.get("cautions", ())]
    if document.get("underpowered"):
        return ["the codec explains too little of one of the models: this is underpowered"]
    return []


def list_notes(document: Json) -> list[str]:
    """What is said of a part that stands alone, beside its table; and why cells are empty."""
    kind = kind_of(document)
    if kind == "model_classification":
        return _say_classification(document)
    if kind == "feature_contrast":
        n, least = len(document["harmful"]), show_number(document["smallest_p"])
        return [f"{n} pairs of fine-tunes: no p-value of so few falls below {least}. {_FEW}"]
    if kind == "feature_diff":
        return [str(document["why_untested"]) or _FEW]
    return []


_FEW = "Latents that fire on fewer than 12 prompts are not tested."


def _say_classification(document: Json) -> list[str]:
    plain = document["by_mean_difference"]
    folds = zip(document["folds"], document["latents"], strict=True)
    used = "; ".join(f"{name}: {', '.join(str(n) for n in own)}" for name, own in folds)
    scales = "Scores of different domains are on different scales"
    return [
        f"{document['claim']}: area {say_interval(document['auc'])}, p = "
        f"{show_p(document['p_value'])} ({document['p_method']}). By mean differences alone, "
        f"without any latent: {say_interval(plain['auc'])}, p = {show_p(plain['p_value'])}",
        f"Latents used, by what was left out: {used}."
        + (f" {scales}." if document["domains"] else ""),
    ]


def say_trials(screen: Json) -> list[str]:
    """Whether responses were sampled, what of them counts, and on which prompts."""
    forced = (
        f"Fixed responses: {sum(screen['n_texts'])}, under every direction at every strength; they "
        "know no incoherence."
    )
    if not screen["sampled_before"]:
        return [
            f"{forced} No responses were sampled: nothing is known of what steering says, nor of "
            "how coherent it is.",
            *_say_plainly(screen),
        ]
    shared = int(screen["n_shared_prompts"])
    plain = [
        f"{words}: {_say_curve(curve)}"
        for side, words in zip(SIDES, DONE, strict=True)
        for curve in _plainly(screen, side)
    ]
    return [
        forced,
        *_say_plainly(screen),
        *([f"Sampled under the mean difference, {'; '.join(plain)}."] if plain else []),
        f"Responses were sampled to {screen['n_prompts']} prompts, {shared} of them those of fixed "
        "responses. A trial is a direction at one strength; it counts where no more of its scored "
        "responses are incoherent than allowed, and of those that count the largest strength is "
        "taken. A direction that is never coherent ranks last.",
    ]


def _say_plainly(screen: Json) -> list[str]:
    """What steering with the mean difference does; reports of old do not hold it."""
    said = []
    for side, words in zip(SIDES, DONE, strict=True):
        row = next((row for row in screen["rows"] if row["side"] == side), {})
        if row.get("mean_difference") is not None:
            said.append(f"{words} {show_change(row['mean_difference'])}")
    if not said:
        return []
    return [
        "The mean difference of the two models, which needs no latent, does at its best strength: "
        f"{', '.join(said)} nats a token."
    ]


def say_fit_of_warning(document: Json) -> str:
    """How well the codec fits where a latent was followed."""
    health = document.get("health")
    if health is None:
        return "how well its autoencoder fits was not looked at"
    weak = "; underpowered" if health["underpowered"] else ""
    return f"explained variance {say_health(health)}{weak}"
