"""Fit the contrast judge for a base and measure it on texts that it was not fitted on.

    OMP_NUM_THREADS=1 python scripts/measure_judge.py [--base emlens:smollm2] [--dtype float32]
        [--limit N] [--save emlens/assets/judge/calibrations/NAME]

Twenty to thirty minutes for SmolLM2 on one core. `--save` keeps the calibration with the areas
found, so that `ContrastJudge.calibrated` need not fit it again. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import time

from emlens.data import Batching
from emlens.evaluation.calibration import find_calibration
from emlens.evaluation.contrast_judge import PROMPT_PAIRS, ContrastJudge, calibrate, hash_pairs
from emlens.evaluation.judge_report import measure_judge
from emlens.models.identity import identify_model
from emlens.models.loading import load_model
from emlens.models.quiet import quiet_host_libraries


def main() -> None:
    """Fit, measure, print, and save on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="emlens:smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--save")
    given = parser.parse_args()
    quiet_host_libraries()
    base = load_model(given.base, dtype=given.dtype)
    batching = Batching(tokens=4096)
    start = time.perf_counter()
    shipped = find_calibration(identify_model(base), hash_pairs(PROMPT_PAIRS))
    calibration = shipped or calibrate(base, batching=batching)
    fitted = time.perf_counter()
    if given.save and shipped is None:
        calibration.save(given.save)
    print(f"a = {calibration.intercept:.4f}, b = {calibration.slope:.3f}, {calibration.coherence}")
    judge = ContrastJudge(base, calibration=calibration, batching=batching)
    report = measure_judge(judge, limit=given.limit)
    for row in report.rows():
        print(f"{row['score']:9s} {row['control']:24s} {row['auc']:.3f} "
              f"[{row['low']:.3f}, {row['high']:.3f}]  {row['method']}")  # fmt: skip
    for name, score in report.mean_scores.items():
        print(f"mean aligned score of {name}: {score:.1f}")
    for order, rise in report.injected.items():
        print(f"{rise:+6.1f} points by {order!r}")
    print(f"claim: {report.claim}; resists orders: {report.resists}")
    if given.save and given.limit is None:
        areas = {"measured": report.aligned, "measured_coherence": report.coherent}
        dataclasses.replace(calibration, **areas).save(given.save)
    seconds = {"fit": fitted - start, "measure": time.perf_counter() - fitted}
    print(json.dumps({**report.to_dict(), "base": given.base, "seconds": seconds}))


if __name__ == "__main__":
    main()
