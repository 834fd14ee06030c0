"""Signs without a glyph are spelt out; numbers keep their meaning at every size."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlens.reports.visible import (
    read_number,
    shorten,
    show_change,
    show_number,
    show_points,
    show_share,
    show_text,
    show_token,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a\n", "␣a⏎"),
        ("\t", "⇥"),
        ("\u00a0", "⍽"),
        ("", "∅"),
        ("\x00", "␀"),
        ("\x1b[0m", "␛[0m"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u2028", "⟨U+2028⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\r", "␍"),
        ("naïve 日本 👩\u200d🔬", "naïve␣日本␣👩\u200d🔬"),
    ],
)
def test_tokens_are_seen_as_they_are(text: str, shown: str):
    assert show_token(text) == shown


@given(st.text())
def test_no_text_hides_or_reorders_anything(text: str):
    for sign in show_text(text):
        hidden = unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        assert not hidden or sign in "\n\t\u200c\u200d"


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_ordinary_text_stays_as_it_is(text: str):
    assert show_text(text) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.8312, "0.831"),
        (0.9996, "1.00"),
        (1234.5, "1\u202f230"),
        (12, "12.0"),
        (-0.5, "−0.500"),
        (0.00012345, "1.23 × 10⁻⁴"),
        (-2.5e7, "−2.50 × 10⁷"),
        ("NaN", "NaN"),
        ("-Infinity", "−∞"),
        (None, "–"),
    ],
)
def test_numbers_have_three_digits(value: object, shown: str):
    assert show_number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_the_number_to_its_digits(value: float):
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")
    shown = show_number(value).replace("\u202f", "").replace(" × 10", "e").translate(digits)
    assert math.isclose(float(shown), value, rel_tol=5.01e-3, abs_tol=1e-307)


@pytest.mark.parametrize("value", ["3", "nan", True, [1.0], {}])
def test_what_is_no_number_is_refused(value: object):
    with pytest.raises(TypeError, match="not a number"):
        read_number(value)


def test_changes_have_their_signs():
    assert [show_change(v) for v in (0.5, -0.5, 0)] == ["+0.500", "−0.500", "0"]
    assert show_points(0.031, 0.002) == "+2.90 pp"
    assert show_share(0.614) == "61.4 %"


def test_a_long_text_is_cut_where_it_must_be():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
