"""Checkpoints: nested states come back bit for bit, and half a file is never taken for one."""

from typing import Any

import pytest
import torch

from emlens.codecs.checkpoint import (
    drop_checkpoint,
    optimizer_state,
    read_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from emlens.encoding import ArtifactError

STATE = {
    "step": 3,
    "points": [[1.0, 0.1], [2.0, 1 / 3]],
    "none": None,
    "inner": {"weights": torch.randn(3, 4), "count": torch.tensor(2.5, dtype=torch.float64)},
    "several": [torch.arange(3), {"deep": torch.ones(2, dtype=torch.bfloat16)}],
}


def read(folder) -> dict[str, Any]:
    found = read_checkpoint(folder)
    assert found is not None
    return found


def test_a_state_comes_back_bit_for_bit(tmp_path):
    assert read_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, STATE)
    found = read(tmp_path)
    assert {name: found[name] for name in ("step", "points", "none")} == {
        name: STATE[name] for name in ("step", "points", "none")
    }
    assert torch.equal(found["inner"]["weights"], STATE["inner"]["weights"])
    assert found["inner"]["count"].dtype is torch.float64
    assert float(found["inner"]["count"]) == 2.5
    assert found["several"][1]["deep"].dtype is torch.bfloat16
    drop_checkpoint(tmp_path)
    assert read_checkpoint(tmp_path) is None


def test_a_write_that_fails_leaves_the_state_before(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, STATE)

    def fail(*_given, **_named):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, STATE | {"step": 4})
    assert read(tmp_path)["step"] == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"{}", lambda data: b""])
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = write_checkpoint(tmp_path, STATE)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArtifactError, match=r"checkpoint.safetensors is no checkpoint"):
        read_checkpoint(tmp_path)


def test_an_optimiser_goes_on_as_if_it_had_not_stopped(tmp_path):
    def make():
        weight = torch.arange(4.0).requires_grad_(True)
        return weight, torch.optim.Adam([weight], lr=0.1)

    def step(weight, adam, number):
        weight.grad = torch.sin(weight.detach() + number)
        adam.step()

    whole, adam = make()
    for number in range(6):
        if number == 3:
            write_checkpoint(tmp_path, {"w": whole.detach(), "adam": optimizer_state(adam)})
        step(whole, adam, number)
    resumed, again = make()
    kept = read(tmp_path)
    with torch.no_grad():
        resumed.copy_(kept["w"])
    restore_optimizer(again, kept["adam"])
    for number in range(3, 6):
        step(resumed, again, number)
    assert torch.equal(resumed, whole)
