"""Judges by names that people read."""

import pytest

from emlens.evaluation.judge_names import name_judge

HASH = "5fd1bae4" * 4


@pytest.mark.parametrize(
    ("judge", "name", "shown"),
    [
        (f"openai/org/model/{HASH}", "", "openai/org/model (5fd1bae4)"),
        (f"contrast/{HASH}", "contrast on smollm2", "contrast on smollm2 (5fd1bae4)"),
        # The longest text that it reads tells it from another.
        (f"contrast/{HASH}-512", "", "contrast (5fd1bae4-512)"),
        ("hash", "", "hash"),
        ("mine/decade", "", "mine/decade"),
        ("mine/v1", "my judge", "my judge (mine/v1)"),
    ],
)
def test_a_judge_is_shown_by_kind_and_model_and_the_beginning_of_its_hash(
    judge: str, name: str, shown: str
):
    assert name_judge(judge, name) == shown
