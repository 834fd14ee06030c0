"""Sums of codes by prompt against dense numpy, for any chunks and any order of merging."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from emlens.codecs import CodecError
from emlens.features import accumulate, encode
from emlens.features.accumulate import FeatureAccumulator, PromptAccumulator, PromptSums
from emlens.features.encode import EncodedRows, encode_rows, split_rows
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError
from tests.codecs.builders import draw, make_sae

WIDE = torch.float64


def dense_codes(sums: PromptSums) -> np.ndarray:
    """Summed codes [prompt d_sae]."""
    found = np.zeros((sums.n_prompts, sums.d_sae))
    found[sums.prompts, sums.latents] = sums.codes
    return found


def expect(codec: Any, prompts: torch.Tensor, x: torch.Tensor, n: int) -> dict[str, np.ndarray]:
    """The sums, from all codes at once."""
    codes = codec.encode(x)
    gone = (x - codec.decode(codes)).numpy()
    one_hot = np.eye(n)[prompts.numpy()].T
    return {
        "codes": one_hot @ codes.values.numpy(),
        "n_tokens": one_hot.sum(1),
        "firings": (codes.values.numpy() > 0).sum(0),
        "activations": one_hot @ x.numpy(),
        "squares": one_hot @ (x.numpy() ** 2).sum(1),
        "missed": one_hot @ (gone**2).sum(1),
    }


def check(sums: PromptSums, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        found = dense_codes(sums) if name == "codes" else getattr(sums, name).numpy()
        np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_active_codes_and_reconstruction_are_those_of_the_codec(architecture: str):
    codec = make_sae(architecture, dtype=WIDE)
    x = draw(23, 12, seed=9, dtype=WIDE)
    found, codes = encode_rows(codec, x), codec.encode(x)
    values = torch.zeros(23, 96, dtype=WIDE)
    values[found.rows, found.latents] = found.values
    assert torch.allclose(values, codes.values, rtol=1e-12, atol=1e-12)
    assert bool((found.values != 0).all())
    expected = codec.decode(codes)
    assert torch.allclose(found.reconstruction, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("device", "values", "cuts"),
    [
        ("cpu", encode.CHUNK_VALUES.cpu, ([384, 384, 132], [128] * 7 + [4])),
        ("cuda", encode.CHUNK_VALUES.elsewhere, ([900], [900])),
    ],
)
def test_rows_are_cut_so_that_their_codes_are_of_bounded_size(
    device: str, values: int, cuts: tuple[list[int], list[int]]
):
    def sizes(n: int, d_sae: int) -> list[int]:
        parts = list(split_rows(n, d_sae, device=device))
        assert all(a.stop == b.start for a, b in pairwise(parts))
        return [part.stop - part.start for part in parts]

    for n, d_sae in ((20_000, 16384), (5000, 131072), (3000, 64), (0, 64)):
        assert sum(sizes(n, d_sae)) == n
        assert all(size * d_sae <= max(values, 128 * d_sae) for size in sizes(n, d_sae))
    assert (sizes(900, 16384), sizes(900, 131072)) == cuts


def test_an_accelerator_encodes_as_many_rows_as_its_search_can_take():
    most = [next(iter(split_rows(1 << 20, d_sae, device="cuda"))).stop for d_sae in (64, 131072)]
    assert most == [4096, 2048]
    assert max(most[1] * 131072, encode.CHUNK_VALUES.elsewhere) < 2**31


rows = st.lists(st.integers(0, 4), min_size=1, max_size=25)


@settings(max_examples=30, deadline=None)
@given(rows, st.data())
def test_streaming_equals_all_at_once_for_any_chunks_and_any_order_of_merging(
    numbers: list[int], data: st.DataObject
):
    numbers = [*range(5), *numbers]
    codec = make_sae("jumprelu", dtype=WIDE)
    x = torch.stack([draw(len(numbers), 12, seed=k, dtype=WIDE) for k in (1, 2)])
    prompts = torch.tensor(numbers)
    shards: list[FeatureAccumulator] = []
    start = 0
    while start < len(numbers):
        if not shards or data.draw(st.booleans()):
            shards.append(FeatureAccumulator(2, n_prompts=5, d_in=12, d_sae=96))
        part = slice(start, start + data.draw(st.integers(1, 9)))
        shards[-1].update(prompts[part], x[:, part], [encode_rows(codec, y) for y in x[:, part]])
        start = part.stop
    first, *others = data.draw(st.permutations(shards))
    for other in others:
        first.merge(other)
    for own, y in zip(first.models, x, strict=True):
        check(own.result(), expect(codec, prompts, y, 5))
    change = first.change()
    assert change is not None
    gap = (x[1] - x[0]).numpy()
    base, tuned = (codec.decode(codec.encode(y)).numpy() for y in x)
    one_hot = np.eye(5)[numbers].T
    np.testing.assert_allclose(change.squares, one_hot @ (gap**2).sum(1), rtol=1e-10)
    left = ((gap - (tuned - base)) ** 2).sum(1)
    np.testing.assert_allclose(change.missed, one_hot @ left, rtol=1e-10)


def test_sums_are_counted_in_double_precision():
    codec = make_sae("standard")
    own = PromptAccumulator(1, d_in=12, d_sae=96)
    x = 1000 + draw(4096, 12, seed=1)
    for part in x.split(256):
        own.update(torch.zeros(256, dtype=torch.long), part, encode_rows(codec, part))
    sums = own.result()
    np.testing.assert_allclose(sums.squares[0], (x.double() ** 2).sum(), rtol=1e-14)
    values = codec.encode(x).values.double().sum(0)
    np.testing.assert_allclose(dense_codes(sums)[0], values, rtol=1e-6)
    assert sums.codes.dtype == WIDE


def make_rows(d_in: int = 12, d_sae: int = 96) -> tuple[torch.Tensor, EncodedRows]:
    codec = make_sae("standard", d_in=d_in, d_sae=d_sae)
    x = draw(3, d_in, seed=1)
    return x, encode_rows(codec, x)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    own = PromptAccumulator(2, d_in=12, d_sae=96)
    x, codes = make_rows()
    prompts = torch.tensor([0, 0, 1])
    own.update(prompts, x, codes)
    before = own.result()
    for other, name in ((make_rows(d_in=11), "11"), (make_rows(d_sae=97), "d_sae of the codes")):
        with pytest.raises(WidthError, match=name):
            own.update(prompts, *other)
    with pytest.raises(ValueError, match="prompts: got 0 to 2, expected 0 to 1"):
        own.update(torch.tensor([0, 1, 2]), x, codes)
    with pytest.raises((WidthError, TypeCheckError), match=r"entries|'x'"):
        own.update(torch.tensor([0, 1]), x, codes)
    with pytest.raises(NonFiniteError):
        own.update(prompts, x.where(x > 0, torch.nan), codes)
    after = own.result()
    for name in ("n_tokens", "codes", "firings", "activations", "squares", "missed"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    with pytest.raises(WidthError, match="prompts of the whole run"):
        own.merge(PromptAccumulator(3, d_in=12, d_sae=96))
    pair = FeatureAccumulator(2, n_prompts=2, d_in=12, d_sae=96)
    with pytest.raises(WidthError, match="models of x is 1"):
        pair.update(prompts, x[None], [codes])
    with pytest.raises(ValueError, match="n_models is 3"):
        FeatureAccumulator(3, n_prompts=2, d_in=12, d_sae=96)


def test_what_leaves_codes_out_counts_all_else_alike():
    x, codes = make_rows()
    prompts = torch.tensor([0, 0, 1])
    full, bare = (PromptAccumulator(2, d_in=12, d_sae=96, keep_codes=k) for k in (True, False))
    for own in (full, bare):
        own.update(prompts, x, codes)
    assert len(bare.result().codes) == 0 < len(full.result().codes)
    for name in ("n_tokens", "firings", "activations", "squares", "missed"):
        assert torch.equal(getattr(bare.result(), name), getattr(full.result(), name))
    with pytest.raises(WidthError, match="codes of some shards would be missing"):
        full.merge(bare)


def test_a_prompt_without_tokens_is_named():
    own = PromptAccumulator(3, d_in=12, d_sae=96)
    x, codes = make_rows()
    own.update(torch.tensor([0, 0, 2]), x, codes)
    with pytest.raises(EmptyAccumulatorError, match=r"1 of 3 prompts .* number 1"):
        own.result()


def test_activations_and_codes_that_are_not_finite_are_refused():
    codec = make_sae("standard")
    x = draw(3, 12, seed=1)
    x[1, 2] = torch.nan
    with pytest.raises(CodecError, match="NaN"):
        encode_rows(codec, x)
    with pytest.raises(NonFiniteError, match="codes of a test"):
        encode_rows(codec, torch.full((1, 12), 3e38))


@settings(max_examples=30, deadline=None)
@given(rows)
def test_rows_are_summed_by_prompt_wherever_they_are(numbers: list[int]):
    x = draw(len(numbers), 7, seed=3, dtype=WIDE)
    prompts = 2 * torch.tensor(numbers)
    seen, sums = accumulate.sum_by_prompt(prompts, x)
    assert seen.tolist() == sorted(set(prompts.tolist()))
    expected = np.zeros((10, 7))
    np.add.at(expected, prompts.numpy(), x.numpy())
    np.testing.assert_allclose(sums, expected[seen.numpy()], rtol=1e-12, atol=1e-12)
    assert accumulate.sum_by_prompt(prompts, x.to("meta"))[1].device.type == "meta"
    assert accumulate.lies_apart(x.to("meta"))
    assert not accumulate.lies_apart(x)


def test_from_a_device_come_sums_of_prompts_and_not_rows(monkeypatch: pytest.MonkeyPatch):
    codec = make_sae("standard", dtype=WIDE)
    prompts, x = torch.tensor([1, 0, 1, 1, 2, 0]), draw(6, 12, seed=4, dtype=WIDE)
    moved: list[tuple[int, ...]] = []
    plain = torch.Tensor.cpu

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(tensor.shape))
        return plain(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", watch)
    monkeypatch.setattr(accumulate, "lies_apart", lambda x: True)
    own = PromptAccumulator(3, d_in=12, d_sae=96)
    for part in (slice(0, 4), slice(4, 6)):
        encoded = encode_rows(codec, x[part])
        moved.clear()
        own.update(prompts[part], x[part], encoded)
        assert [shape for shape in moved if shape[1:] == (12,)] == [(2, 12)]
    check(own.result(), expect(codec, prompts, x, 3))
