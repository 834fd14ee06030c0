"""Growth curves as an image: every curve and every point is drawn, and where it belongs."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from scripts.draw_growth import draw_growth, read_curves

SVG = "{http://www.w3.org/2000/svg}"


def point(x: int, planned: int = 0) -> dict[str, float]:
    measured = {"x": x, "seconds": 0.1 * x, "floor": 10 * 2**20, "peak": (10 + x) * 2**20}
    return {**measured, "loaded": 10 * 2**20, "planned": planned * 2**20}


def write_suite(path: Path, size: str) -> Path:
    curves = {
        "prompts": [point(10), point(100), point(1000)],
        "layers": [point(4, 5), point(32, 4)],
    }
    path.write_text(json.dumps({"rows": [{"row": "growth", "size": size, "sizes": curves}]}))
    return path


def draw(tmp_path: Path) -> tuple[Any, list[list[tuple[float, float]]]]:
    """The image, and the points of each of its lines: seconds, measured and planned bytes."""
    image = ElementTree.fromstring(draw_growth(read_curves(write_suite(tmp_path / "a", "full"))))
    lines = [line.attrib["points"] for line in image.iter(f"{SVG}polyline")]
    return image, [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())]
        for line in lines
    ]


def test_every_curve_has_its_seconds_and_its_bytes(tmp_path: Path):
    image, lines = draw(tmp_path)
    texts = [text.text for text in image.iter(f"{SVG}text")]
    for title in ("prompts: seconds", "prompts: MiB", "layers: seconds"):
        assert title in texts
    assert "layers: MiB of tensors (dashed: planned)" in texts
    assert "1,000" in texts
    assert {"1", "10", "100", "0.4", "3.2"} <= set(texts)  # what was measured stands beside it
    assert [len(line) for line in lines] == [3, 3, 2, 2, 2]
    assert len(list(image.iter(f"{SVG}circle"))) == 12


def test_equal_ratios_are_equally_far_and_more_is_higher(tmp_path: Path):
    _, lines = draw(tmp_path)
    (x0, y0), (x1, y1), (x2, y2) = lines[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert x1 > x0
    assert y1 < y0
    measured, planned = lines[3:]
    # 4 and 32 MiB were measured, 5 and 4 planned.
    assert planned[0][1] < measured[0][1] == planned[1][1]


def test_what_takes_no_bytes_is_left_out_and_the_rest_is_drawn():
    still = {**point(10), "peak": 10 * 2**20}
    image = ElementTree.fromstring(draw_growth({"a < b": [still, {**still, "x": 20}]}))
    assert len(list(image.iter(f"{SVG}circle"))) == 2
    assert "a < b: MiB" in [text.text for text in image.iter(f"{SVG}text")]


def test_a_toy_run_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="--size full --only growth"):
        read_curves(write_suite(tmp_path / "suite.json", "toy"))
