"""Rows for training: cut exactly, held out for good, refused where they do not fit."""

from itertools import chain, islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emlens.codecs.codec import CodecError
from emlens.codecs.rows import ActivationSource, TrainingRows, cut_batches
from emlens.codecs.settings import SaeSettings
from emlens.sites import Site

SETTINGS = SaeSettings(
    architecture="topk",
    d_sae=4,
    k=2,
    steps=6,
    batch_rows=10,
    learning_rate=1.0,
    max_passes=4,
    least_firings=1,
    held_out_rows=7,
)


def number_rows(sizes, *, start=0):
    """Tensors of so many rows that say their own numbers."""
    ends = (torch.tensor([0, *sizes]).cumsum(0) + start).tolist()
    return [torch.arange(a, b).double()[:, None] for a, b in pairwise(ends)]


def numbers(batches):
    return [batch.flatten().int().tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


class Source:
    """Rows that are reshuffled in every pass, here just in reverse in every second one."""

    site = Site(2, "resid_post")
    positions = "all[8:]"
    base_fingerprint = "abc"
    fingerprint = "def"
    n_rows = 30

    def __iter__(self):
        return iter(number_rows([30]))

    def rows_from(self, row):
        while True:
            number, first = divmod(row, self.n_rows)
            order = number_rows([30])[0]
            yield (order.flip(0) if number % 2 else order)[first:]
            row += self.n_rows - first


@given(sizes=st.lists(st.integers(0, 12), max_size=12), rows=st.integers(1, 9))
def test_batches_hold_all_rows_in_their_order_but_the_last_ones(sizes, rows):
    found = numbers(cut_batches(number_rows(sizes), rows))
    assert all(len(batch) == rows for batch in found)
    assert flat(found) == list(range(sum(sizes) // rows * rows))


def test_rows_of_paired_activations_are_cut_along_the_tokens():
    pairs = torch.stack([torch.arange(5.0)[:, None], torch.arange(5.0)[:, None] + 10])
    found = list(cut_batches([pairs[:, :3], pairs[:, 3:]], 2))
    assert [batch.tolist() for batch in found] == [
        [[[0.0], [1.0]], [[10.0], [11.0]]],
        [[[2.0], [3.0]], [[12.0], [13.0]]],
    ]


@pytest.mark.parametrize("sizes", [[5, 3, 30], [38], [1] * 38])
def test_the_first_rows_are_held_out_of_every_pass(sizes):
    rows = TrainingRows(number_rows(sizes), None, settings=SETTINGS, axes=2)
    assert rows.held_out.flatten().tolist() == list(range(7))
    assert rows.n_rows == 31
    passes = [*range(7, 38)] * 3
    found = numbers(islice(rows.batches(0), 6))
    assert flat(found) == passes[:60]
    assert numbers([rows.first]) == found[:1]
    again = TrainingRows(number_rows(sizes), None, settings=SETTINGS, axes=2)
    assert numbers(islice(again.batches(4), 2)) == found[4:]
    assert again.describe() == rows.describe()


def test_held_out_rows_that_are_given_leave_all_others_to_train_on():
    rows = TrainingRows(
        iter(number_rows([61])), number_rows([4, 9], start=100), settings=SETTINGS, axes=2
    )
    assert rows.held_out.flatten().tolist() == list(range(100, 107))
    assert flat(numbers(islice(rows.batches(0), 6))) == list(range(60))


def test_a_source_is_read_from_any_row_and_says_where_it_is_from():
    source = Source()
    assert isinstance(source, ActivationSource)
    rows = TrainingRows(source, number_rows([7]), settings=SETTINGS, axes=2)
    whole = numbers(islice(rows.batches(0), 6))
    assert flat(whole) == [*range(30), *reversed(range(30))]
    assert numbers(islice(rows.batches(4), 2)) == whole[4:]
    assert (rows.positions, rows.base_fingerprint, rows.n_rows) == ("all[8:]", "abc", 30)
    assert rows.describe()["fingerprint"] == "def"
    rows.check_site(Site(2, "resid_post"))
    with pytest.raises(CodecError, match=r"site: got resid_post.3, .* are of resid_post.2"):
        rows.check_site(Site(3, "resid_post"))
    with pytest.raises(CodecError, match=r"held_out: none was given"):
        TrainingRows(source, None, settings=SETTINGS, axes=2)


def test_other_rows_are_told_apart():
    first = TrainingRows(number_rows([80]), None, settings=SETTINGS, axes=2).describe()
    other = TrainingRows(number_rows([80], start=1), None, settings=SETTINGS, axes=2).describe()
    assert first["first"] != other["first"]
    assert first["held_out"] != other["held_out"]


@pytest.mark.parametrize(
    ("parts", "axes", "named"),
    [
        ([torch.zeros(80)], 2, r"activations: tensor 0 has shape \(80,\)"),
        ([torch.zeros(2, 80, 3)], 2, r"shape \(2, 80, 3\).*\[n, d_in\]"),
        ([torch.zeros(80, 3)], 3, r"shape \(80, 3\).*\[models, n, d_in\]"),
        ([torch.zeros(80, 3, dtype=torch.int32)], 2, r"torch.int32, expected real numbers"),
        ([torch.zeros(9, 3), torch.zeros(80, 4)], 2, r"tensor 1 has shape \(80, 4\), others"),
    ],
)
def test_other_shapes_are_refused_by_name(parts, axes, named):
    with pytest.raises(CodecError, match=named):
        TrainingRows(iter(parts), None, settings=SETTINGS, axes=axes)
