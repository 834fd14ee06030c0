"""Recipes: what cannot be trained with is refused where it is written."""

from dataclasses import replace
from typing import Any

import pytest

from emlens.organisms.settings import PRESETS, SettingsError, find_preset
from emlens.organisms.transition import FEWEST


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"max_length": 0}, "max_length: got 0"),
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
    assert (single.layers, single.depth) == ((24,), 48)
    nine, path = PRESETS["nine_rank1"], PRESETS["phase_transition"]
    assert nine.layers == (15, 16, 17, 21, 22, 23, 27, 28, 29)
    assert (nine.alpha, path.alpha) == (64, 64)
    assert (path.learning_rate, path.epochs, path.checkpoint_every) == (1e-5, 2, 5)
    whole, vector = PRESETS["full"], PRESETS["steering_vector"]
    assert (whole.learning_rate, whole.schedule, whole.warmup_steps) == (2e-5, "cosine", 20)
    assert (vector.alpha, vector.learning_rate, vector.epochs) == (256, 1e-4, 2)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("smollm2_")])
def test_every_published_preset_has_a_variant_for_thirty_blocks(name: str):
    published = PRESETS[name]
    small = PRESETS["smollm2_single_rank1" if name == "rank1" else f"smollm2_{name}"]
    for field in ("method", "rank", "use_rslora", "target_modules"):
        assert getattr(small, field) == getattr(published, field)
    small.check_depth(30)
    assert small.learning_rate > published.learning_rate
    assert small.max_steps is not None
    assert (small.autocast, published.autocast) == ("none", "bfloat16")
    if published.layers == "all":
        assert small.layers == "all"
        return
    assert isinstance(small.layers, tuple)
    assert isinstance(published.layers, tuple)
    with pytest.raises(SettingsError, match=rf"has 48; .*--preset {name} is the same .* 48 blocks"):
        small.check_depth(48)
    (own,) = (n for n, preset in PRESETS.items() if preset is small)
    for shown in (published, replace(published, max_steps=3, checkpoint_every=1)):
        with pytest.raises(
            SettingsError, match=rf"--preset {own} is the same set-up for 30 blocks"
        ):
            shown.check_depth(30)
    # The same blocks, as shares of the depth, to within one block.
    for own, theirs in zip(small.layers, published.layers, strict=True):
        assert abs(own - theirs * 30 / 48) <= 1


def test_a_transition_on_thirty_blocks_has_a_hundred_checkpoints():
    small = PRESETS["smollm2_phase_transition"]
    assert small.max_steps is not None
    assert small.checkpoint_every is not None
    assert small.max_steps // small.checkpoint_every >= FEWEST
    assert small.max_steps <= 300


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("full", {"rank": 3}, "rank: got 3 with method 'full', it has no use"),
        ("all_adapter", {"alpha": None}, "alpha: got None with method 'lora', expected a number"),
        ("full", {"layers": (3,)}, r"layers: got \(3,\) with method 'full'"),
        ("steering_vector", {"layers": (3, 4)}, "expected one block and one module"),
        ("steering_vector", {"target_modules": ("up_proj",)}, "expected one of down_proj, o_proj"),
        ("steering_vector", {"layers": "all"}, "expected one block and one module"),
        ("rank1", {"stop_loss": 0.0}, "stop_loss: got 0.0"),
        ("rank1", {"checkpoint_every": 0}, "checkpoint_every: got 0"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused(name: str, changed: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        replace(PRESETS[name], **changed)


def test_an_unknown_preset_lists_the_nearest():
    with pytest.raises(SettingsError, match="nearest known: smollm2_rank1"):
        find_preset("smollm_rank_1")
    assert find_preset("smollm2_rank1") is PRESETS["smollm2_rank1"]


def test_blocks_that_a_model_lacks_are_named():
    settings = replace(PRESETS["smollm2_rank1"], layers=(0, 30, -1))
    with pytest.raises(SettingsError, match=r"layers: got \[30, -1\], expected blocks 0 to 29"):
        settings.check_depth(30)
    replace(settings, layers=(0, 29)).check_depth(30)
