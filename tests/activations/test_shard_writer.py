"""Shards written in the background: order, errors, and what an error elsewhere leaves."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emlens.activations import capture_activations, shard_writer
from emlens.activations.reading import ReadingPlan
from emlens.activations.shard_writer import ShardWriter
from emlens.artifacts import write_tensors_atomic
from tests.activations.chats import make_chats
from tests.activations.test_capture import SITES, SMALL, capture, tiny

WAIT = 20.0
"""Seconds after which a test fails that waits for another thread."""


def test_a_shard_is_written_while_the_next_batch_runs(tmp_path, monkeypatch):
    runs, second = [], threading.Event()

    class Counted(ReadingPlan):
        def read(self, visit, task, *, chosen=None):
            def count(site, x, selections):
                runs.append(site)
                if len(runs) > len(SITES):
                    second.set()
                visit(site, x, selections)

            return super().read(count, task, chosen=chosen)

    def wait_and_write(path: Path, tensors):
        assert second.wait(WAIT), "the second batch never began while the first was being written"
        return write_tensors_atomic(path, tensors)

    monkeypatch.setattr("emlens.activations.reading.ReadingPlan", Counted)
    monkeypatch.setattr(shard_writer, "write_tensors_atomic", wait_and_write)
    assert capture(tmp_path / "run").n_shards > 2


def test_at_most_one_file_is_being_written(tmp_path, monkeypatch):
    order: list[str] = []

    def note(path: Path, tensors):
        order.append(f"{path.name} begins")
        found = write_tensors_atomic(path, tensors)
        order.append(f"{path.name} ends")
        return found

    monkeypatch.setattr(shard_writer, "write_tensors_atomic", note)
    with ShardWriter() as writer:
        for name in "abc":
            writer.write(tmp_path / name, {"x": torch.ones(2)})
            order.append(f"{name} was given")
    # A file is begun only after the one before has ended.
    ends = {name: order.index(f"{name} ends") for name in "abc"}
    assert all(ends[a] < order.index(f"{b} was given") for a, b in ("ab", "bc"))
    assert all(ends[a] < order.index(f"{b} begins") for a, b in ("ab", "bc"))
    assert all(load_file(tmp_path / name)["x"].sum() == 2 for name in "abc")


@pytest.mark.parametrize("failing", [0, 2])
def test_a_disk_that_is_full_is_told_and_keeps_what_was_written(tmp_path, monkeypatch, failing):
    written: list[Path] = []

    def fill(path: Path, tensors):
        if len(written) == failing:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_tensors_atomic(path, tensors)

    monkeypatch.setattr(shard_writer, "write_tensors_atomic", fill)
    with pytest.raises(OSError, match="No space left"):
        capture(tmp_path / "run")
    assert len(list((tmp_path / "run" / "shards").glob("*.safetensors"))) == failing


def test_the_last_file_failing_is_told_on_leaving(tmp_path, monkeypatch):
    def fail(path: Path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_tensors_atomic", fail)
    with pytest.raises(OSError, match="No space left"), ShardWriter() as writer:
        writer.write(tmp_path / "a", {"x": torch.ones(2)})


def test_an_error_says_so_where_the_last_file_failed_too(tmp_path, monkeypatch):
    def fail(path: Path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_tensors_atomic", fail)

    def write_and_fail():
        with ShardWriter() as writer:
            writer.write(tmp_path / "a", {"x": torch.ones(2)})
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as raised:
        write_and_fail()
    assert "No space left" in "".join(raised.value.__notes__)


def test_what_is_captured_is_not_what_a_later_hook_writes_to(tmp_path):
    whole = capture(tmp_path / "whole", positions="all", chats=make_chats()[:1])
    model = tiny()
    # The next block's input is the very tensor of resid_post.0.
    model.blocks[1].hook_resid_pre.add_hook(lambda tensor, hook: tensor.zero_())
    changed = capture(tmp_path / "changed", model=model, positions="all", chats=make_chats()[:1])
    kept = [next(shards.batches("resid_post.0")) for shards in (whole, changed)]
    assert torch.equal(*kept)


def test_a_batch_that_fails_leaves_the_shard_before_it(tmp_path):
    model, passes = tiny(), []

    def fail(tensor, hook):
        passes.append(len(tensor))
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    model.blocks[0].hook_resid_pre.add_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture_activations(
            model,
            make_chats(),
            sites=SITES,
            positions="response",
            out=tmp_path / "run",
            batching=SMALL,
        )
    assert len(list((tmp_path / "run" / "shards").glob("*.safetensors"))) == 2


@pytest.mark.gpu
def test_from_a_gpu_values_arrive_before_they_are_written(tmp_path, monkeypatch):
    for room in (shard_writer.PINNED_BYTES, 0):
        monkeypatch.setattr(shard_writer, "PINNED_BYTES", room)
        x = torch.randn(4096, 1024, device="cuda")
        expected = x @ x.T
        with ShardWriter() as writer:
            for n in range(3):
                product = writer.bring(x @ x.T)
                writer.write(tmp_path / f"{room}-{n}", {"x": product})
        for n in range(3):
            assert torch.equal(load_file(tmp_path / f"{room}-{n}")["x"], expected.cpu())
