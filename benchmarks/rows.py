"""How a row is run: alone, or one of many by ``python -m benchmarks``."""

import argparse
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.gpu import watch_gpu
from benchmarks.memory import free_memory, measure_residence
from benchmarks.records import Record, format_line, format_table
from benchmarks.settings import DTYPES, FULL_ROUNDS, SHAPES, TOY_ROUNDS, Settings, check_settings

BATCHED = ("decode", "decode_intervened")
"""Rows that time several numbers of rows at once, of which ``--batch`` chooses one."""
WITHOUT_GPU = ("api_judging",)
"""Rows that no GPU has a part in."""
ROWS = (
    *("load_views", "load_tuned", "prefill", "decode", "decode_intervened", "respond"),
    *("ablate", "stream", "pair_diff", "growth", "train", "judging", "api_judging"),
    *("sae_diff", "steer_screen"),
)


def run_alone(measure: Callable[[Settings], Record], argv: Sequence[str] | None = None) -> None:
    """Read the arguments of one row, run it, and print table and JSON line."""
    parser = argparse.ArgumentParser(description="The last line printed is one JSON object.")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    settings = read_settings(arguments)
    check_batch(settings, [Path(inspect.getfile(measure)).stem])
    record = prepare_and_run(measure, settings)
    print(format_table(record))
    print(format_line(record))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that one row and the whole suite have in common."""
    parser.add_argument("--size", choices=("toy", "full"), default="toy")
    parser.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, help="pairs behind each ratio (15 at full size)")
    parser.add_argument("--threads", type=int, help="2 at full size, 1 at toy size")
    parser.add_argument(
        "--shape", choices=SHAPES, default="7b", help="of Qwen2.5, with --suite gpu --size full"
    )
    parser.add_argument(
        "--batch", type=int, help=f"one number of rows at once, in {' and '.join(BATCHED)}"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="one only")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for one thread on a machine that others use",
    )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Turn parsed arguments into settings; exits with the reason where they cannot be met."""
    full = arguments.size == "full"
    try:
        return check_settings(
            Settings(
                size=arguments.size,
                device="cuda" if arguments.suite == "gpu" else "cpu",
                threads=arguments.threads or (2 if full else 1),
                rounds=arguments.rounds or (FULL_ROUNDS if full else TOY_ROUNDS),
                clock=arguments.clock,
                only_dtype=arguments.dtype,
                only_batch=arguments.batch,
                shape=arguments.shape,
            )
        )
    except RuntimeError as error:
        raise SystemExit(str(error)) from error


def check_batch(settings: Settings, rows: Sequence[str]) -> None:
    """Exit with the reason where ``--batch`` would change nothing."""
    idle = [row for row in rows if row not in BATCHED]
    if settings.only_batch is not None and idle:
        raise SystemExit(
            f"--batch {settings.only_batch}: {', '.join(idle)} has one batch only; "
            f"it is for {' and '.join(BATCHED)}"
        )


def rows_of(settings: Settings) -> tuple[str, ...]:
    """The rows of a suite."""
    return tuple(row for row in ROWS if settings.device == "cpu" or row not in WITHOUT_GPU)


def prepare_and_run(measure: Callable[[Settings], Record], settings: Settings) -> Record:
    """Run one row with the threads asked for, without a network or a word from the libraries."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(settings.threads)
    disable_progress_bar()
    set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
        with watch_gpu(settings.device) as samples:
            record = measure(settings)
    free_memory()
    peaks = measure_peaks(record.row, record.peak_sides, settings)
    return replace(record, gpu=samples.describe(), peak_bytes={**record.peak_bytes, **peaks})


def run_row(row: str, settings: Settings) -> Record:
    """Run a row by name."""
    return prepare_and_run(importlib.import_module(f"benchmarks.{row}").measure, settings)


def measure_peaks(row: str, sides: Sequence[str], settings: Settings) -> dict[str, int]:
    """Peak bytes of a process that runs one side alone; at full size only, they take seconds.

    Resident bytes on a CPU; on a GPU those of tensors and those reserved for them. Both for the
    whole process, loading included, and for what it does once it has loaded.
    """
    if not settings.full:
        return {}
    peaks: dict[str, int] = {}
    for dtype in settings.dtypes:
        for side in sides:
            try:
                found = measure_residence(row, side, dtype, settings)
            except RuntimeError as error:
                if "OutOfMemoryError" not in str(error):
                    raise
                continue  # the row's notes say what does not fit
            whole = found.gpu or {"resident": found.peak}
            peaks |= {f"{dtype}: {side}, {what}": n for what, n in whole.items()}
            peaks[f"{dtype}: {side}, after loading"] = found.peaks[-1]
    return peaks
