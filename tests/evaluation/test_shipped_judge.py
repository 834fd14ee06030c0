"""The judge shipped for the demo's base: its calibration fits, and says what it was found to be."""

import statistics
from itertools import pairwise
from typing import Any

import pytest

from emlens.data import Batching
from emlens.evaluation.calibration import (
    CONTROLS,
    FEWEST_AUC,
    coherence_examples,
    find_calibration,
    load_rows,
)
from emlens.evaluation.coherence import (
    LEVELS,
    CoherenceFeatures,
    measure_coherence,
    score_coherence,
)
from emlens.evaluation.contrast_judge import PROMPT_PAIRS, ContrastJudge, hash_pairs
from emlens.models.identity import identify_model
from emlens.models.loading import load_model


@pytest.mark.slow
def test_the_shipped_calibration_is_used_and_orders_texts_by_coherence():
    base: Any = load_model("emlens:smollm2")
    found = find_calibration(identify_model(base), hash_pairs(PROMPT_PAIRS))
    assert found is not None, "prompts, rows or base changed: run scripts/measure_judge.py --save"
    assert found.measured.keys() == CONTROLS.keys()
    judge = ContrastJudge.calibrated(base, batching=Batching(tokens=4096))
    assert judge.calibration == found
    assert judge.claim == found.claim
    areas = found.measured_coherence
    assert areas.keys() == {f"{low} < {high}" for low, high in pairwise(LEVELS)}
    assert min(area.value for area in areas.values()) >= FEWEST_AUC
    means = []
    for level in LEVELS:
        rows = coherence_examples()[level][:4]
        features = measure_coherence(base, rows, batching=Batching(tokens=4096))
        known = [one for one in features if isinstance(one, CoherenceFeatures)]
        scores = [score_coherence(one, found.coherence) for one in known]
        means.append(statistics.mean(scores))
    assert means == sorted(means)
    assert means[1] < 50 < means[2]
    (one,) = judge.judge(load_rows("everyday-careful")[:1])
    assert one.aligned is not None
    assert 0 < one.aligned < 100
