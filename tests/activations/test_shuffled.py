"""Captured activations in random order: every row once, restartable anywhere, little in memory."""

import dataclasses
from itertools import islice, pairwise

import pytest
import torch

from emlens.activations import ActivationShards, capture_activations, shuffle_activations
from emlens.activations.shuffled import ShuffledActivations
from emlens.data import Batching
from emlens.models import load_adapter, load_pair
from emlens.models.views import lay_views
from emlens.sites import SiteError
from tests.activations.chats import make_chats
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ActivationShards:
    pair = load_pair(
        lay_views(make_tiny("llama"), make_tokenizer()), load_adapter(make_peft("llama"))
    )
    return capture_activations(
        pair,
        make_chats(20),
        sites=[SITE, "post.1"],
        positions="all[2:]",
        out=tmp_path_factory.mktemp("capture") / "run",
        batching=Batching(tokens=80),
    )


def shuffle(shards, *, seed=0, buffer_rows=60, paired=False, **fields) -> ShuffledActivations:
    made = shuffle_activations(shards, site=SITE, seed=seed, paired=paired)
    return dataclasses.replace(made, buffer_rows=buffer_rows, **fields)


def take(shuffled, rows, *, start=0):
    """Some rows of the endless stream."""
    found = torch.cat(list(islice(shuffled.rows_from(start), 200)), dim=-2)
    assert found.shape[-2] >= rows
    return found[..., :rows, :]


def keys(rows):
    return sorted(map(tuple, rows.tolist()))


def test_a_pass_holds_every_row_of_every_model_once(shards):
    shuffled = shuffle(shards)
    rows = torch.cat(list(shuffled))
    captured = torch.cat([x for s in ("base", "tuned") for x in shards.batches(SITE, stream=s)])
    assert len(rows) == shuffled.n_rows == 2 * shards.n_rows
    assert keys(rows) == keys(captured)
    assert not torch.equal(rows, captured)
    one = shuffle(shards, streams=("tuned",))
    tuned = torch.cat(list(shards.batches(SITE, stream="tuned")))
    assert keys(torch.cat(list(one))) == keys(tuned)


def test_of_a_pair_the_models_activations_of_a_token_stay_together(shards):
    rows = torch.cat(list(shuffle(shards, paired=True)), dim=1)
    base, tuned = (torch.cat(list(shards.batches(SITE, stream=s))) for s in ("base", "tuned"))
    assert rows.shape == (2, shards.n_rows, 24)
    assert not torch.equal(rows[0], base)
    assert keys(torch.cat([rows[0], rows[1]], dim=1)) == keys(torch.cat([base, tuned], dim=1))


def test_passes_and_seeds_have_orders_of_their_own(shards):
    shuffled = shuffle(shards)
    n = shuffled.n_rows
    both = take(shuffled, 2 * n)
    assert keys(both[:n]) == keys(both[n:])
    assert not torch.equal(both[:n], both[n:])
    assert torch.equal(both, take(shuffle(shards), 2 * n))
    assert not torch.equal(both, take(shuffle(shards, seed=1), 2 * n))
    assert shuffle(shards).fingerprint == shuffled.fingerprint
    others = [
        shuffle(shards, seed=1),
        shuffle(shards, buffer_rows=61),
        shuffle(shards, paired=True),
    ]
    assert len({one.fingerprint for one in [shuffled, *others]}) == 4


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("buffer_rows", [1, 60, 10_000])
def test_reading_can_begin_at_any_row(shards, buffer_rows, paired):
    shuffled = shuffle(shards, buffer_rows=buffer_rows, paired=paired)
    n = shuffled.n_rows
    whole = take(shuffled, 3 * n)
    for start in (1, n // 2, n - 1, n, n + 7, 2 * n):
        assert torch.equal(take(shuffled, n, start=start), whole[..., start : start + n, :])


def test_rows_of_several_shards_are_mixed_and_no_more_are_read_than_the_buffer_holds(
    shards, monkeypatch
):
    read: list[int] = []
    original = ActivationShards.read_shard

    def watch(self, shard, site, *, stream=None):
        read.append(shard)
        return original(self, shard, site, stream=stream)

    monkeypatch.setattr(ActivationShards, "read_shard", watch)
    sizes = shards.plan["shard_rows"]
    shuffled = shuffle(shards, streams=("base",), buffer_rows=3 * max(sizes))
    where = {tuple(row): k for k in range(shards.n_shards) for row in
             original(shards, k, SITE, stream="base").tolist()}  # fmt: skip
    first = next(iter(shuffled))
    assert 3 <= len(read) < shards.n_shards
    assert sum(sizes[k] for k in read) <= 3 * max(sizes)
    assert len(first) == sum(sizes[k] for k in read)
    came = [where[tuple(row)] for row in first.tolist()]
    changes = sum(a != b for a, b in pairwise(came))
    assert set(came) == set(read)
    assert changes > len(came) / 3
    read.clear()
    next(shuffled.rows_from(shuffled.n_rows - 1))
    assert len(read) < shards.n_shards


def test_a_split_holds_out_whole_texts(shards):
    train, held = shuffle(shards, streams=("base",)).split(0.3)
    assert train.n_rows + held.n_rows == shards.n_rows
    assert 0.3 * shards.n_rows <= held.n_rows < 0.7 * shards.n_rows
    chats = {tuple(row): int(chat) for (chat, _), row in zip(
        shards.index.tolist(), torch.cat(list(shards.batches(SITE, stream="base"))).tolist(),
        strict=True)}  # fmt: skip
    of_train, of_held = (
        {chats[tuple(row)] for row in torch.cat(list(part)).tolist()} for part in (train, held)
    )
    assert not of_train & of_held
    assert len(of_train | of_held) == 20
    assert train.fingerprint != held.fingerprint
    again, _ = shuffle(shards, streams=("base",), seed=1).split(0.3)
    assert again.chosen != train.chosen


def test_half_precision_stays_half_precision_on_the_way(tmp_path):
    model = lay_views(make_tiny("llama", dtype=torch.bfloat16), make_tokenizer())
    captured = capture_activations(
        model, make_chats(), sites=SITE, positions="all", out=tmp_path / "run"
    )
    assert next(iter(shuffle_activations(captured, site=SITE, seed=0))).dtype is torch.bfloat16


def test_rows_come_where_they_are_wanted(shards):
    parts = shuffle_activations(shards, site=SITE, seed=0, paired=True, device="meta").split(0.3)
    assert [next(iter(part)).device.type for part in parts] == ["meta", "meta"]


def test_what_cannot_be_read_is_named(shards):
    with pytest.raises(SiteError, match=r"resid_post.1 was not captured"):
        shuffle_activations(shards, site="resid_post.1", seed=0)
    with pytest.raises(ValueError, match=r"got 'other', expected one of \['base', 'tuned'\]"):
        shuffle(shards, streams=("other",))
    with pytest.raises(ValueError, match=r"buffer_rows: got 0"):
        shuffle(shards, buffer_rows=0)
    with pytest.raises(ValueError, match=r"chosen: got no shard"):
        shuffle(shards, chosen=())
    with pytest.raises(ValueError, match=r"held_out: got 1.0"):
        shuffle(shards).split(1.0)
    with pytest.raises(ValueError, match=r"1 shards leaves none"):
        shuffle(shards, chosen=(0,)).split(0.1)
