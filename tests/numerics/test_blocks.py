"""Rows cut into blocks: all of them, in order, as large as the device wants them."""

import pytest
import torch

from emlens.numerics.blocks import BLOCK_VALUES, split_blocks


@pytest.mark.parametrize(("n", "width"), [(23, 1 << 17), (3, 1 << 20), (0, 5), (7, 1)])
def test_blocks_hold_all_rows_and_no_more_values_than_fit(n: int, width: int):
    rows = torch.arange(n)[:, None].expand(n, width)
    parts = split_blocks(rows.float())
    assert torch.equal(torch.cat(parts)[:, 0], torch.arange(n).float())
    assert all(part.numel() <= BLOCK_VALUES.cpu or len(part) == 1 for part in parts)
    assert len(parts) == max(1, -(-n // max(1, BLOCK_VALUES.cpu // width)))


def test_an_accelerator_gets_larger_blocks():
    rows = torch.empty(5, BLOCK_VALUES.elsewhere // 2, device="meta")
    assert [len(part) for part in split_blocks(rows)] == [2, 2, 1]
