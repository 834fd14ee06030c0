"""Counter-based numbers: known values, the distributions they claim, no trace of batch or order."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats

from emlens.numerics.counter import (
    counter_bits,
    counter_gumbel,
    counter_normal,
    counter_uniform,
    derive_key,
)

KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8)
DRAWS = (counter_uniform, counter_normal, counter_gumbel)


def keys_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def splitmix(state: int, n: int) -> list[int]:
    """SplitMix64 in whole numbers, as published: the stream from a state."""
    found = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_the_published_stream_comes_out_for_its_published_seed():
    # The first numbers of SplitMix64 from seed 1234567.
    assert splitmix(1234567, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=40)
@given(KEYS, st.integers(0, 2**64 - 1))
def test_bits_are_splitmix_from_the_mixed_key_and_counter(values: list[int], counter: int):
    bits = counter_bits(keys_of(*values), counter, 5)
    for key, row in zip(values, bits.tolist(), strict=True):
        # One step of the stream from s is mix(s + golden).
        mixed = splitmix(key, 1)[0] + counter
        (start,) = splitmix((mixed - 0x9E3779B97F4A7C15) % 2**64, 1)
        assert [value % 2**64 for value in row] == splitmix(start, 5)


@pytest.mark.parametrize("draw", DRAWS)
@settings(max_examples=25)
@given(KEYS, st.integers(0, 2**40), st.integers(1, 9))
def test_a_row_is_the_same_alone_and_in_any_batch(draw, values, counter, width):
    together = draw(keys_of(*values), counter, width)
    for place, key in enumerate(values):
        assert torch.equal(draw(keys_of(key), counter, width)[0], together[place])
    assert torch.equal(draw(keys_of(*values), counter, width + 3)[:, :width], together)
    each = torch.full((len(values),), counter)
    assert torch.equal(draw(keys_of(*values), each, width), together)


def test_uniform_numbers_are_uniform_along_rows_keys_and_counters():
    many = torch.arange(20_000)
    along = {
        "places": counter_uniform(keys_of(7), 3, 20_000)[0],
        "keys": counter_uniform(many, 3, 1)[:, 0],
        "counters": counter_uniform(torch.full_like(many, 7), many, 1)[:, 0],
    }
    for name, drawn in along.items():
        assert stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01, name
        lags = np.corrcoef(drawn[:-1].numpy(), drawn[1:].numpy())[0, 1]
        assert abs(lags) < 4 / math.sqrt(len(drawn)), name


def test_neighbouring_keys_and_counters_draw_independently():
    drawn = counter_normal(torch.arange(64), 0, 4000)
    later = counter_normal(torch.arange(64), 1, 4000)
    rows = torch.cat([drawn, later]).numpy()
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    # 8,128 pairs: the largest of as many standard normal numbers is about 4.
    assert abs(correlations).max() * math.sqrt(4000) < 5
    assert np.std(correlations) * math.sqrt(4000) == pytest.approx(1, abs=0.05)


def test_every_bit_is_a_fair_coin_and_flips_with_every_bit_of_the_key():
    base = counter_bits(keys_of(12345), 0, 4000)[0].numpy().view(np.uint64)
    ones = np.unpackbits(base.view(np.uint8)).reshape(len(base), 64).mean(0)
    assert abs(ones - 0.5).max() < 5 * 0.5 / math.sqrt(len(base))
    for bit in range(63):
        other = counter_bits(keys_of(12345 ^ (1 << bit)), 0, 4000)[0].numpy().view(np.uint64)
        flipped = np.unpackbits((base ^ other).view(np.uint8)).mean()
        assert flipped == pytest.approx(0.5, abs=0.01), bit


@pytest.mark.parametrize("width", [20_000, 20_001])
def test_normal_and_gumbel_numbers_have_the_distributions_they_claim(width: int):
    normal = counter_normal(keys_of(3), 0, width)[0]
    assert normal.shape == (width,)
    assert stats.kstest(normal.numpy(), "norm").pvalue > 0.01
    gumbel = counter_gumbel(keys_of(3), 0, width)[0]
    assert stats.kstest(gumbel.double().numpy(), "gumbel_r").pvalue > 0.01


def test_the_largest_gumbel_number_picks_by_probability():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draws = (p.log() + counter_gumbel(torch.arange(40_000), 5, 4)).argmax(-1)
    counts = torch.bincount(draws, minlength=4)
    assert stats.chisquare(counts.numpy(), p.numpy() * 40_000).pvalue > 0.01


def test_blocks_leave_no_seam(monkeypatch: pytest.MonkeyPatch):
    from emlens.numerics import counter

    keys = torch.arange(7)
    whole = counter_gumbel(keys, 2, 500)
    monkeypatch.setattr(counter, "_BLOCK", 7 * 33)
    assert torch.equal(counter_gumbel(keys, 2, 500), whole)
    monkeypatch.setattr(counter, "_BLOCK", 1)
    assert torch.equal(counter_gumbel(keys, 2, 5), whole[:, :5])


def test_numbers_stay_inside_their_range(monkeypatch: pytest.MonkeyPatch):
    from emlens.numerics import counter

    ends = torch.tensor([[0, -1]])  # all bits off, all bits on
    monkeypatch.setattr(counter, "_bits_at", lambda *_: ends.clone())
    for dtype in (torch.float32, torch.float64):
        low, high = counter_uniform(keys_of(1), 0, 2, dtype=dtype)[0].tolist()
        assert 0 < low < 1e-6
        assert 1 - 1e-6 < high < 1
    assert counter_gumbel(keys_of(1), 0, 2).isfinite().all()


def test_keys_tell_parts_their_types_and_their_borders_apart():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (b"ab", "c"), (1, "c"), ("1", "c"), (), ("", "c")]
    assert len({derive_key(*each) for each in parts}) == len(parts)
    assert derive_key("seed", 3, b"x") == derive_key("seed", 3, b"x")
    assert all(0 <= derive_key(i) < 2**63 for i in range(100))
    # Pinned, because stored runs depend on it.
    assert derive_key(5) == int.from_bytes(hashlib.sha256(b"int:1:5").digest()[:8]) >> 1
    with pytest.raises((TypeError, TypeCheckError), match=r"got a float|parts"):
        derive_key(0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="got a bool"):
        derive_key(True)


def test_keys_and_counters_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="int64"):
        counter_bits(torch.zeros(2, dtype=torch.int32), 0, 3)
    with pytest.raises(ValueError, match="dtype"):
        counter_uniform(keys_of(1), 0, 3, dtype=torch.bfloat16)
