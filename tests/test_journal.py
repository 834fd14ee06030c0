"""The journal under kills, full disks and second writers."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emlens import journal
from emlens.journal import Journal, JournalError, JournalLockedError, read_journal
from tests.forks import run_copy, start_copy, wait_for_copy

ROWS = [{"id": f"r{i}", "text": "käse\u2028\n\x85" * i, "n": i} for i in range(6)]


def test_rows_come_back_as_they_went_in_and_in_order(tmp_path: Path):
    path = tmp_path / "deep" / "rows.jsonl"
    with Journal(path) as kept:
        kept.append(ROWS[:2])
        kept.append(ROWS[2:])
        assert kept.ids == tuple(row["id"] for row in ROWS)
        assert "r3" in kept
        assert "r9" not in kept
        assert kept.rows() == ROWS
    assert read_journal(path) == ROWS


def test_an_id_is_kept_once(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as kept:
        kept.append(ROWS[:3])
        before = path.read_bytes()
        for batch in (
            [ROWS[4], ROWS[1]],
            [ROWS[4], ROWS[4]],
            [{"n": 1}],
            [{"id": 3}],
            [{"id": ""}],
        ):
            with pytest.raises(JournalError, match="id"):
                kept.append(batch)
        assert path.read_bytes() == before
        kept.append(ROWS[3:])
    assert read_journal(path) == ROWS


def test_what_json_has_no_number_for_is_refused_whole(tmp_path: Path):
    with Journal(tmp_path / "rows.jsonl") as kept:
        with pytest.raises(ValueError, match="JSON"):
            kept.append([ROWS[0], {"id": "x", "n": float("nan")}])
        assert kept.ids == ()
    assert read_journal(tmp_path / "rows.jsonl") == []


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=0))
def test_a_file_cut_anywhere_opens_with_its_whole_lines(tmp_path_factory, place: int):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    with Journal(path) as kept:
        kept.append(ROWS)
    data = path.read_bytes()
    data = data[: place % (len(data) + 1)]
    path.write_bytes(data)
    whole = data.count(b"\n")
    assert read_journal(path) == ROWS[:whole]
    with Journal(path) as kept:
        assert len(kept) == whole
        kept.append(ROWS[whole:])
    assert read_journal(path) == ROWS


def test_zeros_left_by_a_power_cut_are_cut(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as kept:
        kept.append(ROWS[:2])
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    with Journal(path) as kept:
        kept.append(ROWS[2:])
    assert read_journal(path) == ROWS


@pytest.mark.parametrize(
    "line", [b"{]\n", b"[1]\n", b'{"n": 1}\n', b'{"id": "r0"}\n', b"\n", b"\xff\n"]
)
def test_damage_before_the_end_is_named_and_nothing_is_thrown_away(tmp_path: Path, line: bytes):
    path = tmp_path / "rows.jsonl"
    with Journal(path) as kept:
        kept.append(ROWS[:2])
    data = path.read_bytes() + line + b'{"id": "after"}\n'
    path.write_bytes(data)
    for read in (read_journal, Journal):
        with pytest.raises(JournalError, match=r"rows\.jsonl:3"):
            read(path)
    assert path.read_bytes() == data
    path.write_bytes(data[: -len(line) - 16])
    Journal(path).close()  # the lock was given back


def test_one_writer_at_a_time_and_readers_at_any(tmp_path: Path):
    path = tmp_path / "rows.jsonl"

    def open_it() -> None:
        with pytest.raises(JournalLockedError, match="another process"):
            Journal(path)

    with Journal(path) as kept:
        kept.append(ROWS[:1])
        open_it()
        assert run_copy(open_it) == 0
        assert read_journal(path) == ROWS[:1]
    with Journal(path) as again:
        again.append(ROWS[1:])
    with pytest.raises(JournalError, match="closed"):
        again.append([{"id": "late"}])


def test_a_batch_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch):
    calls: list[str] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(journal.os, "write", lambda f, d: calls.append("write") or write(f, d))
    monkeypatch.setattr(journal.os, "fsync", lambda f: calls.append("fsync") or fsync(f))
    with Journal(tmp_path / "rows.jsonl") as kept:
        calls.clear()
        kept.append(ROWS)
        assert calls == ["write", "fsync"]


def test_a_disk_that_takes_a_part_at_a_time_gets_the_rest(tmp_path: Path, monkeypatch):
    write = os.write
    monkeypatch.setattr(journal.os, "write", lambda f, d: write(f, d[:7]))
    with Journal(tmp_path / "rows.jsonl") as kept:
        kept.append(ROWS)
    assert read_journal(tmp_path / "rows.jsonl") == ROWS


def fill_the_disk(path: Path) -> None:
    """Append in vain to a file that may not grow, then where it may; writes down what was said."""
    told: list[object] = []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Journal(path) as kept:
        kept.append([{"id": "a", "text": "x" * 500}])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, hard))
        try:
            kept.append([{"id": "b", "text": "y"}, {"id": "c", "text": "z" * 500}])
        except OSError as error:
            told += [f"{type(error).__name__} {error.errno} {kept.ids}", error]
            told += [[row["id"] for row in read_journal(path)]]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept.append([{"id": "b", "text": "y"}])
    path.with_name("told").write_text("\n".join(map(str, told)))


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    assert run_copy(lambda: fill_the_disk(path)) == 0
    kind, says, kept = (tmp_path / "told").read_text().splitlines()
    assert (kind, kept) == ("JournalWriteError 27 ('a',)", "['a']")
    for part in (str(path), "File too large", "the 1 rows that were finished are kept", "goes on"):
        assert part in says
    assert [row["id"] for row in read_journal(path)] == ["a", "b"]


def write_rows(path: Path, told: int | None = None) -> None:
    """Six hundred rows, five at a time, those that are missing; tells a pipe of each five kept."""
    with Journal(path) as kept:
        for start in range(0, 600, 5):
            batch = [
                {"id": f"row-{i}", "text": "x" * (i * 37 % 900)} for i in range(start, start + 5)
            ]
            if missing := [row for row in batch if row["id"] not in kept]:
                kept.append(missing)
                if told is not None:
                    os.write(told, f"{start} ".encode())


def write_and_be_killed(path: Path, seconds: float) -> bool:
    """Kill a writer so long after it has kept something; whether the kill came before its end."""
    reads, told = os.pipe()
    child = start_copy(lambda: write_rows(path, told))
    os.close(told)
    heard = os.read(reads, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    killed = wait_for_copy(child) == -signal.SIGKILL
    while more := os.read(reads, 4096):
        heard += more
    os.close(reads)
    # Whatever was told to be kept is there.
    kept = {row["id"] for row in read_journal(path)}
    assert all(f"row-{int(start) + 4}" in kept for start in heard.split())
    return killed


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(tmp_path: Path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write_rows(whole)
    generator, kills = random.Random(0), 0
    for _ in range(60):
        kills += write_and_be_killed(killed, generator.random() * 0.02)
        if len(read_journal(killed)) == 600:
            break
    assert kills >= 3
    write_rows(killed)
    assert killed.read_bytes() == whole.read_bytes()
    assert [row["id"] for row in read_journal(killed)] == [f"row-{i}" for i in range(600)]
