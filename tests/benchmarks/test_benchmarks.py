"""The instruments of the benchmarks: intervals, verdicts, records, bytes. The rows run in CI."""

import contextlib
import json
import math
import os
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import __main__ as suite
from benchmarks import gpu
from benchmarks.decode import step_seconds
from benchmarks.records import Figure, Record, find_slowdowns, format_line, format_table
from benchmarks.rows import rows_of
from benchmarks.settings import Settings
from benchmarks.timing import (
    Ratio,
    Timings,
    exact_ratio,
    median_ratio,
    single_ratio,
    time_sides,
)
from tests.forks import run_copy

TOY = Settings(size="toy", threads=1, rounds=6)
ROOT = Path(__file__).resolve().parents[2]


def make_figure(median: float, half: float, **settings: Any) -> Figure:
    ratio = Ratio(median=median, low=median - half, high=median + half, pairs=15, coverage=0.96)
    given: dict[str, Any] = {"name": "vs_peer", "dtype": "float32", "better": "higher"}
    return Figure(**(given | settings), ratio=ratio)


def make_record(*figures: Figure, **settings: Any) -> Record:
    given: dict[str, Any] = {"row": "decode", "settings": TOY, "sizes": {}}
    headline = {"vs_peer": figures[0].name}
    return Record(**(given | settings), figures=figures, headline=headline)


def as_json(record: Record) -> dict[str, Any]:
    return json.loads(format_line(record))


class Clock:
    """A clock that a side moves forward by its own, planted time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def side(self, name: str, times: Iterator[float]):
        def run() -> None:
            self.calls.append(name)
            self.now += next(times)

        return run


def drawn_times(median: float, seed: int, spread: float = 0.1) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield median * math.exp(generator.gauss(0, spread))


def time_planted(rounds: int, *, slower: float) -> tuple[Timings, Clock]:
    clock = Clock()
    sides = {
        "A": clock.side("A", drawn_times(1.0, 1)),
        "B": clock.side("B", drawn_times(slower, 2)),
    }
    return time_sides(sides, rounds=rounds, clock=lambda: clock.now), clock


def test_a_side_that_takes_twice_as_long_is_found_to():
    timings, _ = time_planted(15, slower=2.0)
    cost = timings.cost("B", "A")
    assert cost.median == pytest.approx(2, rel=0.1)
    assert cost.low < 2 < cost.high
    assert cost.low > 1.7
    assert cost.high < 2.3


def test_speed_is_the_inverse_of_cost():
    timings, _ = time_planted(15, slower=2.0)
    assert timings.speed("A", "B") == timings.cost("B", "A")
    assert timings.speed("B", "A").median == pytest.approx(0.5, rel=0.1)


def test_sides_are_timed_back_and_forth_after_a_warm_up():
    timings, clock = time_planted(3, slower=2.0)
    assert clock.calls == ["A", "B", *"AB", *"BA", *"AB"]
    assert {len(values) for values in timings.seconds.values()} == {3}


def test_a_warm_up_is_not_timed():
    clock = Clock()
    slow_at_first = clock.side("A", iter([100.0, 1.0, 1.0]))
    timings = time_sides({"A": slow_at_first}, rounds=2, clock=lambda: clock.now)
    assert timings.seconds["A"] == (1.0, 1.0)


def test_drift_that_both_sides_share_leaves_the_ratio_alone():
    clock = Clock()
    drift = [1.5**i for i in range(8)]
    sides = {
        "A": clock.side("A", iter(drift)),
        "B": clock.side("B", iter([3 * x for x in drift])),
    }
    timings = time_sides(sides, rounds=7, clock=lambda: clock.now)
    assert timings.cost("B", "A") == replace(timings.cost("B", "A"), median=3, low=3, high=3)


@given(st.integers(6, 60))
def test_an_interval_covers_what_the_binomial_says(n: int):
    ratio = median_ratio(list(range(n)))
    k = int(ratio.low) + 1
    assert ratio.high == n - k
    assert ratio.coverage == pytest.approx(1 - 2 * stats.binom.cdf(k - 1, n, 0.5))
    assert ratio.coverage >= 0.95
    assert 1 - 2 * stats.binom.cdf(k, n, 0.5) < 0.95, "a narrower interval covers it too"


def test_intervals_hold_the_median_as_often_as_they_claim():
    generator = random.Random(3)
    runs = [median_ratio([generator.expovariate(1) for _ in range(15)]) for _ in range(2000)]
    held = sum(run.low <= math.log(2) <= run.high for run in runs) / len(runs)
    assert held == pytest.approx(runs[0].coverage, abs=0.015)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="5 pairs, expected at least 6"):
        median_ratio([1.0] * 5)


@pytest.mark.parametrize(
    ("median", "better", "verdict"),
    [
        (1.2, "higher", "met"),
        (1.05, "higher", "undecided"),
        (0.8, "higher", "missed"),
        (0.8, "lower", "met"),
        (1.05, "lower", "undecided"),
        (1.2, "lower", "missed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(median: float, better: str, verdict: str):
    assert make_figure(median, 0.1, better=better, aim=1.0).verdict == verdict


def test_a_count_at_its_aim_meets_it():
    for better in ("higher", "lower"):
        figure = replace(make_figure(1, 0, better=better, aim=1.0), ratio=exact_ratio(1.0))
        assert figure.verdict == "met"


def test_the_json_line_is_one_line_with_the_ratios_of_the_first_dtype():
    record = make_record(make_figure(2.0, 0.1), make_figure(3.0, 0.1, dtype="bfloat16"))
    line = format_line(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["ratios"] == {"vs_peer": 2.0}
    assert found["versions"]["torch"] == torch.__version__
    assert {"row", "size", "device", "threads", "sizes", "seconds", "peak_bytes"} <= set(found)
    assert found["machine"]["processor"]
    assert found["machine"]["cores"] == os.cpu_count()
    assert [f["ratio"]["median"] for f in found["figures"]] == [2.0, 3.0]


def test_the_table_shows_interval_aim_and_verdict():
    text = format_table(make_record(make_figure(2.0, 0.1, aim=3.0)))
    assert "2.000 [1.900, 2.100]" in text
    assert ">= 3 missed" in text


@pytest.mark.parametrize(
    ("now", "better", "slower"),
    [
        (1.7, "higher", True),
        (1.85, "higher", False),
        (2.5, "higher", False),
        (2.3, "lower", True),
        (2.15, "lower", False),
        (1.0, "lower", False),
    ],
)
def test_compare_flags_what_is_worse_beyond_both_intervals(now: float, better: str, slower: bool):
    old = as_json(make_record(make_figure(2.0, 0.1, better=better)))
    new = as_json(make_record(make_figure(now, 0.1, better=better)))
    assert bool(find_slowdowns(old, new)) == slower


def test_compare_ignores_figures_that_are_new_and_refuses_other_settings():
    old = as_json(make_record(make_figure(2.0, 0.1)))
    new = make_record(make_figure(1.0, 0.1, name="another"))
    assert find_slowdowns(old, as_json(new)) == []
    other = replace(new, settings=replace(TOY, threads=2))
    with pytest.raises(ValueError, match="threads: 1 then, 2 now"):
        find_slowdowns(old, as_json(other))


@pytest.mark.parametrize(
    ("aim", "now", "slower"), [(1.05, 1.04, False), (1.05, 1.06, True), (None, 3.0, False)]
)
def test_compare_flags_what_was_measured_once_only_where_it_leaves_its_aim(
    aim: float | None, now: float, slower: bool
):
    one = replace(make_figure(1, 0, better="lower", aim=aim), ratio=single_ratio(1.01))
    old = as_json(make_record(one))
    new = as_json(make_record(replace(one, ratio=single_ratio(now))))
    assert bool(find_slowdowns(old, new)) == slower


def test_compare_flags_any_count_that_has_become_worse():
    one = replace(make_figure(1, 0, better="lower"), ratio=exact_ratio(1.01))
    new = as_json(make_record(replace(one, ratio=exact_ratio(1.02))))
    assert len(find_slowdowns(as_json(make_record(one)), new)) == 1


def test_shapes_of_another_size_do_not_compare():
    gpu = as_json(make_record(make_figure(2.0, 0.1))) | {"shape": "7b"}
    with pytest.raises(ValueError, match="shape: '7b' then, '14b' now"):
        find_slowdowns(gpu, gpu | {"shape": "14b"})


def run_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], median: float, *more: str
) -> tuple[int, list[str]]:
    monkeypatch.setattr(suite, "run_row", lambda row, _: make_record(make_figure(median, 0.1)))
    code = suite.main(["--size", "toy", "--only", "decode", *more])
    return code, capsys.readouterr().out.splitlines()


def test_the_suite_writes_what_a_later_run_compares_itself_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    kept = str(tmp_path / "old.json")
    code, lines = run_suite(monkeypatch, capsys, 2.0, "--out", kept)
    assert code == 0
    assert json.loads(lines[-1]) == json.loads(Path(kept).read_text())
    code, lines = run_suite(monkeypatch, capsys, 1.95, "--compare", kept)
    assert code == 0
    code, lines = run_suite(monkeypatch, capsys, 1.5, "--compare", kept)
    assert code == 1
    assert any(line.startswith("SLOWER decode: vs_peer (float32) was 2.000") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_suite_says_what_it_lacks():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        suite.main(["--suite", "gpu", "--only", "decode"])


def test_a_script_finds_the_benchmarks_wherever_it_is_called(tmp_path: Path):
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('benchmarks.rows') is None)"
    # -P: of the paths that every script has, its own folder aside.
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_row_runs_alone_and_ends_in_one_json_object(tmp_path: Path):
    script = str(ROOT / "benchmarks" / "decode.py")

    def run_script() -> None:
        sys.argv = [script, "--size", "toy"]
        with (tmp_path / "out").open("w") as file, contextlib.redirect_stdout(file):
            runpy.run_path(script, run_name="__main__")

    assert run_copy(run_script) == 0
    found = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert found["row"] == "decode"
    assert set(found["ratios"]) == {"vs_bound", "vs_huggingface"}
    assert all(value > 0 for value in found["ratios"].values())
    assert found["work"]["batch 1, float32: step"]["bytes_per_s"] > 0
    assert any("share of the machine's bytes/s" in figure["name"] for figure in found["figures"])


def test_too_few_rounds_for_an_interval_are_refused_before_anything_runs():
    with pytest.raises(SystemExit, match="--rounds 5: expected at least 6"):
        suite.main(["--rounds", "5", "--only", "decode"])


def test_processor_time_is_refused_where_waiting_threads_spend_it():
    with pytest.raises(SystemExit, match="--clock cpu with 2 threads"):
        suite.main(["--clock", "cpu", "--threads", "2", "--only", "decode"])
    assert replace(TOY, clock="cpu").read_clock() < replace(TOY, clock="wall").read_clock()


def test_a_share_is_one_rate_over_another():
    timings = Timings(seconds={"pass": (2.0,) * 6, "squares": (0.5,) * 6})
    # 30 a second beside 120 a second.
    assert timings.share("pass", 60, "squares", 60).median == pytest.approx(0.25)


def test_a_derived_side_follows_from_the_others_round_by_round():
    timings = Timings(seconds={"emlens": (9.0, 11.0), "first token": (2.0, 4.0)})
    assert timings.derived("step", lambda f: step_seconds(f, 8)).seconds["step"] == (1.0, 1.0)


def test_a_row_that_fails_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    called: list[str] = []

    def run(row: str, _settings: Settings) -> Record:
        called.append(row)
        if row == "decode":
            raise AssertionError("row 3 leaves Hugging Face's tokens")
        return make_record(make_figure(2.0, 0.1), row=row)

    monkeypatch.setattr(suite, "run_row", run)
    monkeypatch.setattr(suite, "free_memory", lambda: called.append("freed"))
    out = tmp_path / "suite.json"
    code = suite.main(["--only", "decode", "--only", "ablate", "--out", str(out)])
    assert code == 1
    assert called == ["freed", "decode", "freed", "ablate"]
    found = json.loads(out.read_text())
    assert [row["row"] for row in found["rows"]] == ["ablate"]
    assert found["failed"] == {"decode": "AssertionError: row 3 leaves Hugging Face's tokens"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("FAILED decode: AssertionError")
    assert json.loads(lines[-1]) == found


def test_records_of_other_settings_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    kept = str(tmp_path / "old.json")
    run_suite(monkeypatch, capsys, 2.0, "--out", kept)
    monkeypatch.setattr(suite, "run_row", lambda *_: pytest.fail("a row was run"))
    with pytest.raises(SystemExit, match="decode: threads: 1 then, 2 now"):
        suite.main(["--only", "decode", "--threads", "2", "--compare", kept])


def test_a_batch_is_refused_by_rows_that_have_one_only():
    with pytest.raises(SystemExit, match="--batch 32: prefill has one batch only"):
        suite.main(["--batch", "32", "--only", "prefill"])
    with pytest.raises(SystemExit, match="--batch 0: expected at least one row"):
        suite.main(["--batch", "0", "--only", "decode"])
    assert TOY.batches((1, 32)) == (1, 32)
    assert replace(TOY, only_batch=4).batches((1, 32)) == (4,)


def test_clocks_are_those_of_a_busy_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    # Columns: clocks of cores and memory, power, its limit, temperature, load.
    lines = ["300, 2619, 70.1, 700, 30, 0", "1980, 2619, 600.5, 700, 61, 99"]
    lines += ["1900, 2619, [N/A], 700, 63, 97"]
    tool.write_text(
        "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + "exec sleep 60\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "device_id", lambda: "GPU-0")
    with gpu.watch_gpu("cuda") as samples:
        time.sleep(0.3)
    assert len(samples) == 3
    found = samples.describe()
    assert found["samples"] == 2
    assert found["clocks.sm"] == 1940
    assert found["clocks.sm, least"] == 1900
    assert found["power.draw"] == 600.5
    with gpu.watch_gpu("cpu") as nothing:
        pass
    assert nothing.describe() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("row", rows_of(replace(TOY, device="cuda")))
def test_a_row_runs_on_a_gpu(row: str):
    found = as_json(suite.run_row(row, replace(TOY, device="cuda")))
    assert found["device"] == torch.cuda.get_device_name()
    assert all(figure["ratio"]["median"] > 0 for figure in found["figures"])


@pytest.mark.gpu
def test_a_kernel_is_timed_to_its_end_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda")

    def multiply(n: int):
        return lambda: [x @ x for _ in range(n)]

    sides = {"once": multiply(1), "ten times": multiply(10)}
    timings = time_sides(sides, rounds=6, device="cuda")
    assert timings.cost("ten times", "once").median == pytest.approx(10, rel=0.3)
