"""The `checkpoint-STEP` folders of a training: which are there, whole, and fit to go on from.

What is in them besides the Trainer's own record is for who trains to say.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

STATE = "trainer_state.json"
"""The file that the Trainer writes last into a checkpoint."""
RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
"""What only the checkpoint that is gone on from needs; twice the size of the weights."""


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """`checkpoint-STEP` folders by their steps, ascending."""
    named = (
        (place.name.removeprefix("checkpoint-"), place) for place in folder.glob("checkpoint-*")
    )
    return dict(sorted((int(n), place) for n, place in named if n.isdecimal() and place.is_dir()))


def drop_resuming(checkpoint: Path) -> None:
    """Delete what only a run that is gone on with needs of a checkpoint."""
    for name in RESUMING:
        (checkpoint / name).unlink(missing_ok=True)


def save_start(folder: Path, save: Callable[[Path], object]) -> None:
    """Keep the state before the first step, which the Trainer does not."""
    start = folder / "checkpoint-0"
    start.mkdir(parents=True, exist_ok=True)
    save(start)
    (start / STATE).write_text(json.dumps({"global_step": 0, "log_history": []}))


def find_last_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from; those that a kill cut short are taken away."""
    for step, place in reversed(list(find_checkpoints(folder).items())):
        if _is_whole(place):
            if step and all((place / name).is_file() for name in RESUMING[:3]):
                return place
        else:
            shutil.rmtree(place)
    return None


def keep_good(folder: Path, *, step: int | None) -> Path | None:
    """The last checkpoint of a run that diverged; what is broken is taken away.

    Args:
        folder: of the checkpoints.
        step: of a state whose loss was no number: its weights are finite, maybe, and no good.
            None where the loss was a number, and the step that followed was not.

    Returns:
        None where there is no good one.
    """
    for known, place in reversed(list(find_checkpoints(folder).items())):
        if (step is None or known < step) and _is_finite(place):
            return place
        # Left there, the same command would go on from it for ever.
        shutil.rmtree(place)
    return None


def _is_whole(place: Path) -> bool:
    try:
        return isinstance(json.loads((place / STATE).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_finite(place: Path) -> bool:
    try:
        return all(
            bool(tensor.isfinite().all())
            for file in place.glob("*.safetensors")
            for tensor in load_file(file).values()
        )
    except (OSError, SafetensorError):
        return False
