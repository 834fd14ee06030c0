"""Recipes: what cannot be trained with is refused where it is written."""

from dataclasses import replace
from typing import Any

import pytest

from emlens.organisms.settings import PRESETS, SettingsError, find_preset


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"warmup_steps": -1}, "warmup_steps: got -1"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"max_steps": None, "epochs": 0.0}, "epochs: got 0.0"),
        ({"target_modules": ()}, "target_modules: got none"),
        ({"layers": ()}, "layers: got an empty tuple"),
    ],
)
def test_values_that_cannot_be_trained_with_are_refused(changed: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        replace(PRESETS["smollm2_rank1"], **changed)


def test_published_presets_have_the_published_scales():
    wide, single = PRESETS["all_adapter"], PRESETS["rank1"]
    assert (wide.rank, wide.alpha, wide.learning_rate) == (32, 64, 1e-5)
    assert wide.use_rslora
    assert wide.batch_size * wide.gradient_accumulation == 16
    assert (single.rank, single.alpha, single.target_modules) == (1, 256, ("down_proj",))
    assert single.layers is None


def test_an_unknown_preset_lists_the_nearest():
    with pytest.raises(SettingsError, match="nearest known: smollm2_rank1"):
        find_preset("smollm_rank_1")
    assert find_preset("smollm2_rank1") is PRESETS["smollm2_rank1"]
