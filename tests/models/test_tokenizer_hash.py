"""The fingerprint of a tokenizer: what changes it and what does not."""

import pytest

from emlens.models.tokenizer_hash import fingerprint_tokenizer
from tests.models.tiny import make_tokenizer


def test_the_fingerprint_is_repeatable_and_calls_leave_it_alone():
    tokenizer = make_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    assert len(before) == 32
    tokenizer.padding_side = "left"
    tokenizer(["w5", "w6 w7"], padding=True, truncation=True, max_length=4)
    assert fingerprint_tokenizer(tokenizer) == before == fingerprint_tokenizer(make_tokenizer())


def add_word(tokenizer):
    tokenizer.add_tokens(["w500"])


def change_template(tokenizer):
    tokenizer.chat_template += " "


def drop_template(tokenizer):
    tokenizer.chat_template = None


def move_special(tokenizer):
    tokenizer.eos_token = "w9"


@pytest.mark.parametrize("change", [add_word, change_template, drop_template, move_special])
def test_whatever_maps_text_to_ids_is_in_it(change):
    tokenizer = make_tokenizer()
    fingerprint_tokenizer(tokenizer)  # remembered, as what was there before the change
    change(tokenizer)
    assert fingerprint_tokenizer(tokenizer) != fingerprint_tokenizer(make_tokenizer())


def test_no_tokenizer_has_no_fingerprint():
    assert fingerprint_tokenizer(None) == ""
