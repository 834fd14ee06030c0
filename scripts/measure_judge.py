"""Measure a judge on texts whose side is known, and on answers that order it to give 100.

    OMP_NUM_THREADS=1 python scripts/measure_judge.py [--base emlens:smollm2] [--dtype float32]
        [--limit N] [--save emlens/assets/judge/calibrations/NAME]
    python scripts/measure_judge.py --judge local/SOURCE|openai/MODEL|inspect/MODEL [--limit N]
        [--judge-base-url URL] [--judge-key-env NAME] [--save FOLDER]

Without `--judge` it is the contrast judge, fitted for a base if nothing is shipped for it: twenty
to thirty minutes for SmolLM2 on one core. `--save` keeps that calibration with the areas found, so
that `ContrastJudge.calibrated` need not fit it again; of any other judge it keeps the report, which
`--judge-report` of the command line reads. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from emlens.cli.judges import KEY_ENV, load_judge
from emlens.data import Batching
from emlens.evaluation.calibration import find_calibration
from emlens.evaluation.contrast_judge import PROMPT_PAIRS, ContrastJudge, calibrate, hash_pairs
from emlens.evaluation.judge_report import JudgeReport, measure_judge
from emlens.models.identity import identify_model
from emlens.models.loading import load_model
from emlens.models.quiet import quiet_host_libraries

BATCH_TOKENS = 4096
"""Run at once."""


def show_report(report: JudgeReport) -> None:
    """Areas, mean scores, orders, and what the judge may claim by them."""
    for row in report.rows():
        print(f"{row['score']:9s} {row['control']:24s} {row['auc']:.3f} "
              f"[{row['low']:.3f}, {row['high']:.3f}]  {row['method']}")  # fmt: skip
    for name, score in report.mean_scores.items():
        print(f"mean aligned score of {name}: {score:.1f}")
    for order, rise in report.injected.items():
        print(f"{rise:+6.1f} points by {order!r}")
    print(f"claim: {report.claim}; resists orders: {report.resists}; {report.unscored} unscored")


def fit_contrast(given: Any) -> ContrastJudge:
    """The contrast judge of a base, fitted where nothing is shipped for it."""
    base, batching = load_model(given.base, dtype=given.dtype), Batching(tokens=BATCH_TOKENS)
    shipped = find_calibration(identify_model(base), hash_pairs(PROMPT_PAIRS))
    calibration = shipped or calibrate(base, batching=batching)
    if given.save and shipped is None:
        calibration.save(given.save)
    print(f"a = {calibration.intercept:.4f}, b = {calibration.slope:.3f}, {calibration.coherence}")
    return ContrastJudge(base, calibration=calibration, batching=batching)


def main() -> None:
    """Fit if need be, measure, print, and save on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", default="contrast")
    parser.add_argument("--judge-base-url")
    parser.add_argument("--judge-key-env", default=KEY_ENV)
    parser.add_argument("--base", default="emlens:smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--save")
    parser.set_defaults(device="auto", batch_tokens=BATCH_TOKENS, out=Path("runs/judge"))
    given = parser.parse_args()
    if given.save and given.limit is not None:
        parser.error("--save keeps what all texts say; leave --limit out")
    quiet_host_libraries()
    start = time.perf_counter()
    contrast = fit_contrast(given) if given.judge == "contrast" else None
    judge = contrast or load_judge(given)
    fitted = time.perf_counter()
    report = measure_judge(judge, limit=given.limit)
    show_report(report)
    if given.save and contrast is None:
        report.save(given.save)
    if given.save and contrast is not None:
        found = dataclasses.replace(
            contrast.calibration,
            measured=report.aligned,
            measured_coherence=report.coherent,
            injected=report.injected,
        )
        found.save(given.save)
    seconds = {"fit": fitted - start, "measure": time.perf_counter() - fitted}
    print(json.dumps({**report.to_dict(), "base": given.base, "seconds": seconds}))


if __name__ == "__main__":
    main()
