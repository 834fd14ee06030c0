"""The tensors of a result on disk: found by their digest, and never lost to a save cut short."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from emlens import artifacts
from emlens.artifacts import Result, read_kind, read_result, write_tensors_atomic
from emlens.encoding import ArtifactError
from tests.test_artifacts import Plain, Whole, edit, make_whole, same


def find_tensors(folder: Path) -> Path:
    (file,) = folder.glob("tensors*.safetensors")
    return file


def test_a_missing_tensor_file_is_named(tmp_path: Path):
    find_tensors(make_whole().save(tmp_path)).unlink()
    with pytest.raises(ArtifactError, match=r"has no tensors-[0-9a-f]{16}\.safetensors"):
        read_result(tmp_path, Whole)


def test_tensors_under_the_name_that_older_results_gave_them_are_read(tmp_path: Path):
    whole = make_whole()
    find_tensors(whole.save(tmp_path)).rename(tmp_path / "tensors.safetensors")
    assert same(read_result(tmp_path, Whole), whole)
    again = make_whole(name="second").save(tmp_path)
    assert same(read_result(again, Whole), make_whole(name="second"))
    assert not (tmp_path / "tensors.safetensors").exists()


class Killed(BaseException):
    """Stands for the end of the process."""


def save_until(step: int, result: Result, folder: Path) -> bool:
    """Save, but end before the step-th time that something on the disk changes."""
    left = step

    def count(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return act(*given, **named)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, count(getattr(owner, name)))
        try:
            result.save(folder)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("new", [make_whole(matrix=torch.zeros(2, 3)), Plain(value=1.0)])
def test_a_save_cut_short_anywhere_leaves_the_old_result_or_the_new(
    tmp_path: Path, new: Result, older: bool
):
    old, seen, finished, step = make_whole(), [], False, 0
    folder = tmp_path / "0"
    while not finished:
        folder, step = old.save(tmp_path / str(step)), step + 1
        if older:
            find_tensors(folder).rename(folder / "tensors.safetensors")
        finished = save_until(step - 1, new, folder)
        found = read_result(folder, Whole if read_kind(folder) == "test_whole" else Plain)
        seen.append(same(found, new))
        assert seen[-1] or same(found, old)
    # Once the new one is there, it stays.
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (False, True)
    assert len(list(folder.iterdir())) == (1 if isinstance(new, Plain) else 2)


def test_a_truncated_or_foreign_tensor_file_is_refused(tmp_path: Path):
    file = find_tensors(make_whole().save(tmp_path))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="is not the file that"):
        read_result(tmp_path, Whole)
    digest = artifacts._digest(file)
    file.rename(tmp_path / "tensors.safetensors")
    edit(tmp_path, lambda document: document.update(tensors_sha256=digest))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        read_result(tmp_path, Whole)


def test_views_of_one_storage_are_written_as_tensors_of_their_own(tmp_path: Path):
    whole = torch.arange(12.0).reshape(3, 4)
    file = write_tensors_atomic(
        tmp_path / "t.safetensors",
        {"whole": whole, "turned": whole.T, "again": whole, "row": whole[1]},
        metadata={"made_by": "test"},
    )
    got = safetensors.torch.load_file(file)
    assert torch.equal(got["whole"], whole)
    assert torch.equal(got["turned"], whole.T)
    assert torch.equal(got["again"], whole)
    assert torch.equal(got["row"], whole[1])
    with safetensors.safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt", "made_by": "test"}
