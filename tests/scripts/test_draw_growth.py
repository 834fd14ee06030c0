"""Growth curves as a fragment of a page: every curve and every point is drawn."""

import json
from pathlib import Path

import pytest

from scripts.draw_growth import draw_growth, read_curves


def point(x: int, planned: int = 0) -> dict[str, float]:
    measured = {"x": x, "seconds": 0.1 * x, "floor": 10 * 2**20, "peak": (10 + x) * 2**20}
    return {**measured, "loaded": 10 * 2**20, "planned": planned * 2**20}


def write_suite(path: Path, size: str) -> Path:
    curves = {"prompts": [point(10), point(1000)], "layers": [point(4, 5), point(32, 40)]}
    path.write_text(json.dumps({"rows": [{"row": "growth", "size": size, "sizes": curves}]}))
    return path


def test_every_curve_has_its_seconds_and_its_bytes(tmp_path: Path):
    html = draw_growth(read_curves(write_suite(tmp_path / "suite.json", "full")))
    for name in ("prompts: seconds", "prompts: MiB", "layers: seconds", "layers: MiB"):
        assert name in html
    assert html.count('"name":"measured"') == 4
    assert html.count('"name":"planned"') == 1
    assert "<html" not in html


def test_a_toy_run_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match="--size full --only growth"):
        read_curves(write_suite(tmp_path / "suite.json", "toy"))
