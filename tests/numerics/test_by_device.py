"""Numbers by the kind of device."""

import pytest
import torch

from emlens.numerics.by_device import ByDevice


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", 3), ("cuda", 7), ("cuda:1", 7), ("mps", 7), ("meta", 7), (torch.device("cpu"), 3)],
)
def test_a_processor_has_its_own_number(device: str | torch.device, expected: int):
    assert ByDevice(cpu=3, elsewhere=7).of(device) == expected
