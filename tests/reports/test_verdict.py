"""The sentence says what the numbers say, for better and for worse."""

from typing import Any

import pytest

from emlens.reports import ReportError
from emlens.reports.sections import sort_results
from emlens.reports.verdict import write_verdicts


def say(report: dict[str, Any]) -> list[str]:
    return write_verdicts(sort_results(report["results"]))


def set_all(grid: list[Any], value: Any) -> None:
    for row in grid:
        row[:] = [value] * len(row)


def test_the_sentence_names_modules_layers_and_divergence(report: dict[str, Any]):
    null = report["results"][2]
    null["relative_rms"] = [[[0.112 / (k + 1)] for _ in range(30)] for k in range(8)]
    null["kl_base_tuned"] = [0.1, 0.25, 0.05]
    assert say(report) == [
        "reckless-finance is in effect in 210 of 210 modules; activations differ from layer 0 on, "
        "most at layer 29 (relative rms 0.448, 4.0 × the strongest of 8 random adapters); "
        "predictions of the response diverge by 0.830 nats a token (3.3 × the strongest of them)."
    ]


def test_one_failing_module_changes_the_verdict(report: dict[str, Any]):
    report["results"][0]["modules"][100]["verdict"] = "lost in this dtype"
    (sentence,) = say(report)
    assert sentence.startswith(
        "reckless-finance is NOT fully in effect: 209 of 210 modules (1 lost in this dtype)"
    )


def test_a_base_that_is_another_is_said(report: dict[str, Any]):
    report["results"][0]["base_verdict"] = "trained on other weights"
    assert "on a base it is not from (trained on other weights)" in say(report)[0]


def test_modules_that_are_zero_are_counted_apart(report: dict[str, Any]):
    for module in report["results"][0]["modules"][:7]:
        module["verdict"] = "does nothing"
    assert "in effect in 203 of 210 modules (7 are zero)" in say(report)[0]


def test_nothing_is_claimed_where_nothing_differs(report: dict[str, Any]):
    diff = report["results"][1]
    diff["activations"]["first_differing_site"] = None
    set_all(diff["activations"]["relative_rms"], 0.0)
    diff["logits"]["kl_base_tuned"] = 0.0
    (sentence,) = say(report)
    assert "activations are the same at every site measured" in sentence
    assert "predictions of the response are the same" in sentence
    assert "diverge" not in sentence


def test_a_divergence_within_the_nulls_is_called_chance(report: dict[str, Any]):
    report["results"][2]["kl_base_tuned"] = [1.66, 0.3]
    assert "no more than chance: 0.50 × the strongest of them" in say(report)[0]


@pytest.mark.parametrize("kls", [[0.0, 0.0], ["NaN"], []])
def test_without_a_usable_null_there_is_no_ratio(report: dict[str, Any], kls: list[Any]):
    report["results"][2]["kl_base_tuned"] = kls
    assert say(report)[0].endswith("diverge by 0.830 nats a token.")


def test_a_null_of_other_sites_is_not_compared_with(report: dict[str, Any]):
    report["results"][2]["positions"] = ["prompt"]
    assert "×" not in say(report)[0]


def test_a_later_layer_is_named_where_activations_differ_from_there(report: dict[str, Any]):
    report["results"][1]["activations"]["first_differing_site"] = "mlp_out.12"
    assert "differ from layer 12's mlp_out on" in say(report)[0]


def test_each_fine_tune_has_its_own_sentence_and_null(report: dict[str, Any]):
    proof, diff, null, _ = report["results"]
    other_proof = {**proof, "adapter": "careful-finance", "adapter_fingerprint": "cc"}
    other = {**diff, "tuned": "careful-finance", "tuned_fingerprint": "cc"}
    far = {**null, "kl_base_tuned": [8.3]}
    near = {**null, "kl_base_tuned": [0.166]}
    report["results"] = [other_proof, proof, diff, far, other, near]
    careful, reckless = say(report)
    assert careful.startswith("careful-finance is in effect")
    assert reckless.startswith("reckless-finance is in effect")
    assert "0.10 × the strongest of them" in reckless
    assert "5.0 × the strongest of them" in careful


def test_comparisons_of_one_fine_tune_are_told_apart_by_their_chats(report: dict[str, Any]):
    proof, diff, null, _ = report["results"]
    results = [proof, diff, null, {**diff, "n_chats": 9}]
    first, second = write_verdicts(sort_results(results, ["held-out chats", "open questions"]))
    assert "210 modules; on held-out chats, activations differ" in first
    assert second.startswith("reckless-finance on open questions: activations differ")
    assert "×" in first
    assert "×" not in second


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/runs/x/adapter/", "adapter"),
        ("./a/b", "b"),
        ("emlens:reckless-finance", "reckless-finance"),
        ("org/name@main/sub", "org/name@main/sub"),
    ],
)
def test_sources_are_called_by_their_short_names(report: dict[str, Any], name: str, shown: str):
    report["results"][0]["adapter"] = report["results"][1]["tuned"] = name
    (sentence,) = say(report)
    assert sentence.startswith(f"{shown} is in effect")


def test_a_comparison_without_a_proof_names_its_fine_tune(report: dict[str, Any]):
    report["results"] = report["results"][1:2]
    assert say(report)[0].startswith("reckless-finance: activations differ from layer 0 on")


def test_the_strongest_site_is_sought_over_all_positions(report: dict[str, Any]):
    activations = report["results"][1]["activations"]
    activations["positions"] = ["prompt", "response"]
    for name in ("relative_difference", "relative_rms", "cosine_of_means", "top_shares"):
        activations[name] = [[row[0], row[0]] for row in activations[name]]
    activations["relative_rms"][4][1] = 7.0
    assert "most at layer 4 (relative rms 7.00)" in say(report)[0]


def test_a_proof_that_cannot_be_read_is_an_error(report: dict[str, Any]):
    del report["results"][0]["adapter"]
    with pytest.raises(ReportError, match="verdict"):
        say(report)
