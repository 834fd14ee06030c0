"""What is left of a command that Ctrl-C ended, in words; it looks at folders alone."""

from collections.abc import Sequence
from pathlib import Path

MANIFEST = "manifest.json"
"""What a run is begun with; a folder with nothing else has nothing to go on from."""


def say_kept(folders: Sequence[Path]) -> str:
    """What the same command would go on from, of all folders that it writes to.

    Args:
        folders: run folders, some of which may not be there; none for a command that only prints.
    """
    if not folders:
        return "nothing of it is kept"
    kept = [folder for folder in folders if _holds_work(folder)]
    if not kept:
        return "nothing was finished yet: the same command begins anew"
    where = " and ".join(map(str, kept))
    if not any(any(folder.rglob(MANIFEST)) for folder in kept):
        return f"{where} may hold a part of what it writes"
    return f"what is finished is in {where}, and the same command goes on from there"


def _holds_work(folder: Path) -> bool:
    """Whether anything but plans and what was being written is there."""
    files = [folder] if folder.is_file() else folder.rglob("*")
    return any(
        file.is_file()
        and file.name != MANIFEST
        and file.suffix not in (".tmp", ".lock")
        and file.stat().st_size > 0
        for file in files
    )
