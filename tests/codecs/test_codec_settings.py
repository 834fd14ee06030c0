"""Settings of codec training: what no codec can be trained with is refused by name."""

from typing import Any

import pytest

from emlens.codecs.settings import CodecSettingsError, CrosscoderSettings, SaeSettings

SIZES: dict[str, Any] = {"d_sae": 64, "k": 4, "steps": 100}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"k": 65}, r"k: got 65, more than the 64 latents"),
        ({"k": 0}, r"k: got 0, expected at least 1"),
        ({"steps": 0}, r"steps: got 0"),
        ({"batch_rows": 1}, r"batch_rows: got 1, expected at least 2"),
        ({"learning_rate": 0.0}, r"learning_rate: got 0.0"),
        ({"learning_rate": float("nan")}, r"learning_rate: got nan"),
        ({"warmup_steps": 60, "decay_steps": 41}, r"60 and decay_steps: 41 are more than the 100"),
        ({"aux_coefficient": -0.1}, r"aux_coefficient: got -0.1"),
        ({"checkpoint_every": 0}, r"checkpoint_every: got 0"),
        ({"max_passes": 0}, r"max_passes: got 0"),
    ],
)
@pytest.mark.parametrize("make", [SaeSettings, CrosscoderSettings])
def test_a_value_out_of_its_range_is_named(make, changed, named):
    kind = {"architecture": "topk"} if make is SaeSettings else {}
    with pytest.raises(CodecSettingsError, match=named):
        make(**{**SIZES, **kind, **changed})


@pytest.mark.parametrize(
    ("architecture", "widths", "named"),
    [
        ("topk", (16, 64), r"\(16, 64\) with architecture 'topk'"),
        ("matryoshka", None, r"None with architecture 'matryoshka'"),
        ("matryoshka", (64,), r"expected two or more"),
        ("matryoshka", (16, 32), r"the last 64"),
        ("matryoshka", (0, 64), r"expected two or more"),
        ("matryoshka", (32, 16, 64), r"expected rising numbers"),
        ("matryoshka", (16, 16, 64), r"expected rising numbers"),
    ],
)
def test_widths_are_those_of_a_matryoshka(architecture, widths, named):
    with pytest.raises(CodecSettingsError, match=named):
        SaeSettings(**SIZES, architecture=architecture, matryoshka_widths=widths)


@pytest.mark.parametrize(
    ("field", "given", "nearest"),
    [
        ("normalisation", "layer_norm", "expected_average_only_in, none"),
        ("autocast", "float16", "bfloat16, none"),
        ("architecture", "gated", "batchtopk, matryoshka, topk"),
    ],
)
def test_a_name_that_nobody_knows_is_refused_with_those_near_it(field, given, nearest):
    settings = SaeSettings(**SIZES, architecture="topk")
    # Set afterwards: tests check types where users have no such check.
    object.__setattr__(settings, field, given)
    with pytest.raises(CodecSettingsError, match=rf"{field}: got '{given}'; nearest: {nearest}"):
        settings.__post_init__()


def test_rows_are_counted_in_steps_rounded_up():
    settings = SaeSettings(**SIZES, architecture="topk", batch_rows=300, dead_after_rows=1000)
    assert settings.rows == 30_000
    assert settings.dead_after_steps == 4
