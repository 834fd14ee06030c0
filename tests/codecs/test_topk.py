"""The k largest, by chunks: torch.topk where values differ, and one answer where they do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from emlens.codecs import topk
from emlens.codecs.topk import merge_largest, pick_latents, select_largest, settle_inactive
from emlens.numerics.by_device import ByDevice
from tests.codecs.builders import draw, make_sae

CPU = torch.device("cpu")


def merge(codes: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, d_sae = codes.shape
    return merge_largest(lambda i, j: codes[i, j], n=n, d_sae=d_sae, k=k, device=CPU)


def by_hand(row: list[float], k: int) -> list[int]:
    """Of equal codes the lower latent, by Python's stable sort."""
    return sorted(range(len(row)), key=lambda j: -row[j])[:k]


@pytest.mark.parametrize("k", [1, 5, 64, 700])
@pytest.mark.parametrize("room", [1, 3000, 10**6])
def test_chunks_give_what_torch_gives_of_the_whole(
    k: int, room: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk, "CHUNK", ByDevice(cpu=room, elsewhere=room))
    monkeypatch.setattr(topk, "ROWS", 7)
    codes = draw(20, 703, seed=0).abs()
    values, columns = merge(codes, k)
    wanted = codes.topk(k, dim=1)
    assert torch.equal(values, wanted.values)
    assert torch.equal(columns, wanted.indices)


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=70, max_size=70), min_size=1, max_size=5),
    st.integers(1, 70),
    st.sampled_from([1, 40, 200, 10**6]),
)
def test_of_equal_codes_the_lower_latent_goes_first(rows: list[list[int]], k: int, room: int):
    codes = torch.tensor(rows, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "CHUNK", ByDevice(cpu=room, elsewhere=room))
        values, columns = merge(codes, k)
    for row, found, active in zip(rows, columns.tolist(), (values > 0).tolist(), strict=True):
        wanted = by_hand([float(code) for code in row], k)
        assert [j for j, on in zip(found, active, strict=True) if on] == [
            j for j in wanted if row[j] > 0
        ]
    settled = settle_inactive(values, columns)
    assert settled.tolist() == [by_hand([float(code) for code in row], k) for row in rows]


@pytest.mark.parametrize("width", [1024, 1000, 4096])
@pytest.mark.parametrize("k", [1, 4, 5, 17])
def test_the_largest_are_found_with_blocks_and_without(width: int, k: int):
    codes = draw(30, width, seed=width + k).abs()
    values, columns = select_largest(codes, k)
    assert torch.equal(values, codes.topk(k, dim=1).values)
    assert torch.equal(codes.gather(1, columns), values)
    crowded = torch.zeros(30, width)
    crowded[:, 64:96] = codes[:, 64:96]  # all of them in one block
    assert torch.equal(select_largest(crowded, k)[0], crowded.topk(k, dim=1).values)


def test_a_tie_with_a_code_in_another_block_goes_to_the_lower_latent():
    codes = torch.zeros(1, 1024)
    codes[0, [700, 3, 350, 900]] = torch.tensor([2.0, 2.0, 5.0, 2.0])
    assert select_largest(codes, 2)[1].tolist() == [[350, 3]]
    assert select_largest(codes, 3)[1].tolist() == [[350, 3, 700]]


def test_latents_are_picked_out_of_sparse_codes_in_any_order_and_twice():
    values = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    indices = torch.tensor([[4, 0], [2, 5]])
    got = pick_latents(values, indices, torch.tensor([4, 2, 4, 1]), 6)
    assert got.tolist() == [[3, 0, 3, 0], [0, 2, 0, 0]]


class LargestTensor(TorchDispatchMode):
    """Remembers the number of bytes of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and not value._is_view():
                self.most = max(self.most, value.nbytes)
        return out


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_memory_grows_neither_with_latents_nor_with_tokens_times_latents(
    architecture: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk, "CHUNK", ByDevice(cpu=1 << 13, elsewhere=1 << 13))
    monkeypatch.setattr(topk, "ROWS", 16)
    found = {}
    for n, d_sae in ((64, 1024), (64, 8192), (512, 1024), (512, 8192)):
        sae = make_sae(architecture, d_in=4, d_sae=d_sae)
        assert sae.fingerprint  # made before anything is counted
        sae.encode_sparse(draw(1, 4, seed=0), k=4)
        with LargestTensor() as largest:
            sae.encode_sparse(draw(n, 4, seed=0), k=4)
        found[n, d_sae] = largest.most
    assert max(found.values()) <= 8 * (1 << 13)  # a chunk, in bytes of its index type at most
    assert found[64, 8192] == found[64, 1024]
