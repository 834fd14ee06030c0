"""Text and numbers as a reader should see them: nothing hidden, nothing reordered, nothing long.

Not an escape for HTML: that is the template engine's, after this.
"""

import math
import unicodedata

NOT_TESTED = "not tested"
_JOINERS = "\u200c\u200d"
"""Invisible, but scripts and emoji fall apart without them, and they reorder nothing."""
_TOKEN_SIGNS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\u00a0": "⍽"})
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def show_text(text: str) -> str:
    """The text with every sign that hides, reorders or rings a bell spelt out; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else _spell(sign) for sign in text)


def show_token(token: str) -> str:
    """A token in one line: its white space visible too, the empty token as `∅`."""
    return show_text(token.translate(_TOKEN_SIGNS)) or "∅"


def show_running(token: str) -> str:
    """A token within running text: a line break is seen and made."""
    return show_text(token).replace("\n", "⏎\n")


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, the last of them an ellipsis if any were cut."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _spell(sign: str) -> str:
    """What stands for a sign that Python does not call printable: those without a glyph."""
    if sign in "\n\t" or sign in _JOINERS or unicodedata.category(sign) == "Zs":
        return sign
    code = ord(sign)
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def read_number(value: object) -> float:
    """A number of a result's JSON, where NaN and infinities are strings.

    Raises:
        TypeError: It is no number.
    """
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{shorten(repr(value), 60)} is not a number")


def show_number(value: object, digits: int = 3) -> str:
    """A number to `digits` significant digits; powers of ten where zeros would be counted."""
    if value is None:
        return "–"
    number = read_number(value)
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else ("∞" if number > 0 else "−∞")
    if number == 0:
        return "0"
    if not 1e-3 <= abs(number) < 1e5:
        mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")
    rounded = float(f"{number:.{digits}g}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{rounded:,.{decimals}f}".replace("-", "−").replace(",", "\u202f")


def show_p(value: object) -> str:
    """A p- or q-value to two digits; without one, and NaN in results of old, nothing was tested."""
    return NOT_TESTED if value is None or math.isnan(read_number(value)) else show_number(value, 2)


def show_share(value: object) -> str:
    """A share between 0 and 1 in per cent."""
    return "–" if value is None else f"{show_number(100 * read_number(value))} %"


def show_change(value: object) -> str:
    """A number with its sign."""
    return f"+{show_number(value)}" if read_number(value) > 0 else show_number(value)


def show_change_from(value: object, before: object) -> str:
    """How far one number lies from another, with its sign."""
    return show_change(read_number(value) - read_number(before))


def show_points(value: object, before: object) -> str:
    """How far one share lies from another, in percentage points."""
    return f"{show_change(100 * (read_number(value) - read_number(before)))} pp"


def finite(value: object) -> float | None:
    """The number, or None where a plot must leave a gap."""
    number = read_number(value)
    return number if math.isfinite(number) else None
