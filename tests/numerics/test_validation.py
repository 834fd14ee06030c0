"""Checks of values: what is not finite is found wherever it stands, in one question a device."""

import pytest
import torch

from emlens.numerics.validation import NonFiniteError, check_finite

BAD = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", range(3))
def test_what_is_not_finite_is_found_in_any_of_the_tensors(value: float, place: int):
    given = [torch.zeros(4, 3), torch.ones(2, dtype=torch.float64), torch.tensor(3.0)]
    check_finite("x", *given)
    given[place].view(-1)[-1] = value
    with pytest.raises(NonFiniteError, match="x holds NaN or infinity"):
        check_finite("x", *given)
    with pytest.raises(NonFiniteError, match="x holds NaN or infinity"):
        check_finite("x", given[place])


def test_nothing_and_whole_numbers_are_finite():
    check_finite("x")
    check_finite("x", torch.zeros(0, 3), torch.arange(4))


def test_a_device_is_asked_once_for_all_its_tensors(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    plain = torch.Tensor.__bool__

    def counting(x: torch.Tensor) -> bool:
        asked.append(x.device.type)
        # This device has no values to tell.
        return True if x.device.type == "meta" else plain(x)

    monkeypatch.setattr(torch.Tensor, "__bool__", counting)
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    check_finite("x", here, there, here, there, here)
    assert sorted(asked) == ["cpu", "meta"]
    with pytest.raises(NonFiniteError):
        check_finite("x", there, here / 0, there)
