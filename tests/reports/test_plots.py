"""Figures hold the numbers they are of, mark what failed, and read no text as a tag."""

import math
from typing import Any, cast

import plotly.graph_objects as go
import pytest
import torch

from emlens.reports import ReportError, plot
from emlens.reports.plots import MEASURES, label, plot_adapter, plot_measure
from tests.reports.synthetic import MODULES, make_activations, make_diff, make_null, make_proof


def traces(figure: go.Figure) -> list[Any]:
    """Its traces; the library's own annotation is wider than what it gives."""
    return list(cast(Any, figure.data))


def test_the_strip_shows_every_module_in_its_place():
    proof = make_proof(n_layers=5)
    (heat, crosses) = traces(plot_adapter(proof.to_dict()))
    assert list(heat["x"]) == list(range(5))
    for module in proof.modules:
        row = MODULES.index(module.module)
        assert 10 ** heat["z"][row][module.layer] == pytest.approx(module.relative_norm)
        assert module.name in heat["customdata"][row][module.layer]
    assert list(crosses["x"]) == []


def test_a_module_of_size_zero_is_a_cell_and_not_a_gap():
    proof = make_proof(n_layers=2).to_dict()
    proof["modules"][3].update(relative_norm=0.0, verdict="does nothing")
    (heat, crosses) = traces(plot_adapter(proof))
    assert heat["z"][3][0] == heat["zmin"]
    assert list(crosses["x"]) == []


def test_modules_of_like_size_look_alike():
    (heat, _) = traces(plot_adapter(make_proof(n_layers=1).to_dict()))
    assert heat["zmax"] - heat["zmin"] >= 1


def test_rows_stand_in_the_order_of_a_block():
    proof = make_proof(n_layers=2).to_dict()
    proof["modules"].reverse()
    axis = plot_adapter(proof).to_dict()["layout"]["yaxis"]
    assert list(axis["ticktext"]) == list(MODULES)


def test_every_failing_module_is_crossed_out():
    (_, crosses) = traces(plot_adapter(make_proof(n_layers=4, failing=9).to_dict()))
    assert sorted(zip(crosses["x"], crosses["y"], strict=True)) == sorted(
        [(0, row) for row in range(7)] + [(1, 0), (1, 1)]
    )


def test_modules_of_one_name_in_attention_and_mlp_are_kept_apart():
    proof = make_proof(n_layers=2).to_dict()
    for module in proof["modules"]:
        module["module"] = (
            "c_proj" if module["module"] in ("o_proj", "down_proj") else module["module"]
        )
        module["name"] = module["name"].replace("o_proj", "c_proj").replace("down_proj", "c_proj")
    (heat, _) = traces(plot_adapter(proof))
    assert len(heat["z"]) == 7
    assert not any(size is None for row in heat["z"] for size in row)


def test_an_embedding_has_a_column_of_its_own():
    proof = make_proof(n_layers=2).to_dict()
    proof["modules"].append(
        {**proof["modules"][0], "name": "lm_head", "module": "lm_head", "layer": None}
    )
    figure = plot_adapter(proof)
    assert list(traces(figure)[0]["x"]) == [-1, 0, 1]
    assert figure.to_dict()["layout"]["xaxis"]["ticktext"][0] == "emb."


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.field)
def test_the_band_spans_the_least_and_the_greatest_null(measure: Any):
    null = make_null()
    low, high, line = traces(
        plot_measure(make_activations().to_dict(), measure, null=null.to_dict())
    )
    values = getattr(null, measure.null_field)[:, :, 0]
    torch.testing.assert_close(torch.tensor(low["y"]), values.amin(0))
    torch.testing.assert_close(torch.tensor(high["y"]), values.amax(0))
    assert high["fill"] == "tonexty"
    assert list(line["x"]) == list(range(30))


def test_without_nulls_there_is_no_band():
    (line,) = traces(plot_measure(make_activations().to_dict(), MEASURES[2]))
    assert line["y"][0] == pytest.approx(1.0)


def test_a_null_that_is_not_finite_is_left_out_of_its_band():
    null = make_null().to_dict()
    null["relative_rms"][5][2][0] = "Infinity"
    others = [grid[2][0] for grid in null["relative_rms"][:5] + null["relative_rms"][6:]]
    for grid in null["relative_rms"]:
        grid[7][0] = "NaN"
    low, high, _ = traces(plot_measure(make_activations().to_dict(), MEASURES[1], null=null))
    assert (low["y"][2], high["y"][2]) == (min(others), max(others))
    assert low["y"][7] is high["y"][7] is None


def test_a_band_alone_is_drawn_measure_by_measure():
    null = make_null()
    bands = traces(plot(null))
    assert len(bands) == 2 * len(MEASURES)
    for place, measure in enumerate(MEASURES):
        values = getattr(null, measure.null_field)[:, :, 0]
        torch.testing.assert_close(torch.tensor(bands[2 * place + 1]["y"]), values.amax(0))


def test_each_stream_and_position_has_its_line():
    activations = make_activations(n_layers=4, positions=("prompt", "response")).to_dict()
    activations["sites"] = ["embed", "resid_post.0", "mlp_out.3", "resid_post.7"]
    lines = traces(plot_measure(activations, MEASURES[0]))
    assert [line["name"] for line in lines] == [
        f"{stream}, {position}"
        for stream in ("embed", "resid_post", "mlp_out")
        for position in ("prompt", "response")
    ]
    assert [list(line["x"]) for line in lines[::2]] == [[0], [0, 7], [3]]


def test_a_number_that_is_not_finite_is_a_gap():
    activations = make_activations(n_layers=3).to_dict()
    activations["relative_rms"][1][0] = "NaN"
    (line,) = traces(plot_measure(activations, MEASURES[1]))
    assert [y is None for y in line["y"]] == [False, True, False]


@pytest.mark.parametrize(
    "result",
    [
        make_proof(),
        make_diff(n_chats=1),
        make_diff(n_chats=1).logits,
        make_activations(),
        make_null(),
    ],
    ids=lambda result: result.kind,
)
def test_every_kind_of_result_can_be_drawn(result: Any):
    figure = plot(result)
    assert isinstance(figure, go.Figure)
    assert traces(figure)
    assert figure == plot(result.to_dict())


def test_a_kind_without_a_figure_is_named():
    with pytest.raises(TypeError, match=r"'adapter_prof'; nearest: adapter_proof"):
        plot({"schema": "emlens/adapter_prof/1"})


def test_a_result_of_another_shape_is_an_error():
    with pytest.raises(ReportError, match="adapter_proof cannot be read"):
        plot({"schema": "emlens/adapter_proof/1", "modules": [{}]})


def test_labels_hold_no_tags():
    assert label("<b>&lt;</b>\n") == "&lt;b&gt;&amp;lt;&lt;/b&gt;⏎"
    assert len(label("x" * 500)) == 80


def test_the_losses_are_drawn_step_by_step(report: dict[str, Any]):
    (line,) = traces(plot(report["results"][3]))
    assert list(line["x"]) == list(range(1, 17))
    assert line["y"][0] == pytest.approx(0.9 + 2.4 * math.exp(0))
