"""The one sentence a report begins with, from its JSON alone; not a test of significance.

`x times the strongest` compares with the greatest of the random adapters, not with their mean.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from emlens.reports.behaviour import say_behaviour, say_difference
from emlens.reports.document import reading
from emlens.reports.features import say_features
from emlens.reports.sections import (
    Comparison,
    Json,
    Sections,
    failing_modules,
    list_series,
    short_name,
)
from emlens.reports.solutions import say_pair
from emlens.reports.turns import say_trace
from emlens.reports.visible import read_number, show_number

_SPANS = {"response": "the response", "prompt": "the prompt", "all": "all tokens"}
_WHO = "the strongest of"
_ROLES = {
    "tuned": "{}",
    "ablated": "{} with one direction taken out",
    "control": "{} with a random one taken out instead",
    "base": "the base {}",
    "steered": "{} with the direction added to it",
}
"""Arms that the sentence names, by their roles."""


def write_verdicts(sections: Sections) -> list[str]:
    """One sentence for each fine-tune: its proof and its comparison joined by name or print.

    Further comparisons of one fine-tune have sentences of their own, after its first.

    Raises:
        ReportError: A result lacks what the sentence says.
    """
    with reading("verdict"):
        pairs = _pair_up(sections.proofs, sections.comparisons)
        sentences = [_say_removal(removal) for removal in sections.removals]
        sentences += [say_behaviour(evaluation) for evaluation in sections.evaluations]
        sentences += [say_difference(difference) for difference in sections.differences]
        sentences += [say_trace(turn) for turn in sections.turns]
        sentences += [say_pair(pair) for pair in sections.solutions]
        sentences += [sentence for found in sections.features for sentence in say_features(found)]
        sentences += ["; ".join(_clauses(proof, comparison)) for proof, comparison in pairs]
    return [f"{sentence}." for sentence in sentences if sentence]


def _say_removal(removal: Json) -> str:
    arms = {str(arm["role"]): arm for arm in removal["arms"]}
    shares = {role: _say_share(arm) for role, arm in arms.items() if role in _ROLES}
    parts = [words.format(shares[role]) for role, words in _ROLES.items() if role in shares]
    return f"{removal['claim']} of {short_name(str(removal['tuned']))}: {', '.join(parts)}"


def _say_share(arm: Json) -> str:
    share, coherent = (
        read_number(arm[name]["value"]) for name in ("em_percent", "coherent_percent")
    )
    return f"{share:.0f} % ({coherent:.0f} % coherent)"


def _pair_up(
    proofs: Sequence[Json], comparisons: Sequence[Comparison]
) -> list[tuple[Json | None, Comparison | None]]:
    if len(proofs) == len(comparisons) == 1:
        return [(proofs[0], comparisons[0])]
    left = list(comparisons)
    pairs: list[tuple[Json | None, Comparison | None]] = []
    for proof in proofs:
        own = [c for c in left if _same_adapter(proof, c)]
        left = [c for c in left if not any(c is other for other in own)]
        pairs.append((proof, own[0] if own else None))
        pairs += [(None, comparison) for comparison in own[1:]]
    return [*pairs, *((None, comparison) for comparison in left)]


def _same_adapter(proof: Json, comparison: Comparison) -> bool:
    origin = comparison.origin
    name = origin.get("tuned") == proof["adapter"]
    return name or origin.get("tuned_fingerprint") == proof["adapter_fingerprint"]


def _clauses(proof: Json | None, comparison: Comparison | None) -> list[str]:
    clauses = [] if proof is None else [_say_proof(proof)]
    if comparison is None:
        return clauses
    found = []
    if comparison.activations is not None:
        found.append(_say_activations(comparison.activations, comparison.null))
    if comparison.logits is not None:
        found.append(_say_logits(comparison.logits, comparison.null, found))
    if not found:
        return clauses
    where = f"on {comparison.chats}, " if comparison.chats else ""
    if proof is None and comparison.name is not None:
        where = f"{comparison.name} on {comparison.chats}: " if where else f"{comparison.name}: "
    return [*clauses, where + "; ".join(found)]


def _say_proof(proof: Json) -> str:
    modules, bad = proof["modules"], failing_modules(proof)
    good = sum(m["verdict"] == "in effect" for m in modules)
    idle = sum(m["verdict"] == "does nothing" for m in modules)
    name = short_name(str(proof["adapter"]))
    clause = f"{name} is in effect in {good} of {len(modules)} modules"
    if bad:
        counts = Counter(str(m["verdict"]) for m in bad)
        reasons = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        clause = f"{name} is NOT fully in effect: {good} of {len(modules)} modules"
        clause += f" ({reasons})"
    if idle:
        clause += f", {idle} of them zero by its own numbers" if bad else f" ({idle} are zero)"
    verdict = str(proof.get("base_verdict", "same"))
    return clause if verdict == "same" else f"{clause}, on a base it is not from ({verdict})"


def _say_activations(activations: Json, null: Json | None) -> str:
    if activations["first_differing_site"] is None:
        return "activations are the same at every site measured"
    start = _say_site(str(activations["first_differing_site"]))
    best = None
    for series in list_series(activations):
        for site, row, size in zip(
            series.sites, series.rows, series.values(activations["relative_rms"]), strict=True
        ):
            if not math.isfinite(size):
                return f"activations are not finite at {site}"
            if best is None or size > best[0]:
                best = (size, site, row, series.column)
    if best is None:
        return f"activations differ from {start} on"
    size, site, row, column = best
    nulls = [read_number(n[row][column]) for n in null["relative_rms"]] if null else []
    ratio = _compare_to_null(size, nulls)
    where = f"{_say_site(site)} (relative rms {show_number(size)}{ratio})"
    return f"activations differ from {start} on, most at {where}"


def _say_logits(logits: Json, null: Json | None, before: Sequence[str]) -> str:
    span = _SPANS.get(str(logits["positions"]), str(logits["positions"]))
    kl = read_number(logits["kl_base_tuned"])
    if not math.isfinite(kl):
        return f"predictions of {span} are not finite (KL {show_number(kl)})"
    if kl == 0:
        return f"predictions of {span} are the same"
    nulls = [read_number(value) for value in null["kl_base_tuned"]] if null else []
    ratio = _compare_to_null(kl, nulls).removeprefix(", ")
    if any(_WHO in clause for clause in before):
        ratio = re.sub(rf"{_WHO} \d+ random adapters", f"{_WHO} them", ratio)
    size = f"predictions of {span} diverge by {show_number(kl)} nats a token"
    return f"{size} ({ratio})" if ratio else size


def _say_site(site: str) -> str:
    stream, _, layer = site.rpartition(".")
    if not layer.isdecimal():
        return site
    return f"layer {layer}" if stream == "resid_post" else f"layer {layer}'s {stream}"


def _compare_to_null(size: float, nulls: Sequence[float]) -> str:
    """How a number stands to the greatest of its nulls; empty where there is nothing to say."""
    finite = [value for value in nulls if math.isfinite(value)]
    if not finite or max(finite) <= 0:
        return ""
    ratio = size / max(finite)
    who = f"{_WHO} {len(finite)} random adapters"
    if ratio <= 1:
        return f", no more than chance: {show_number(ratio, 2)} × {who}"
    return f", {show_number(ratio, 2)} × {who}"
