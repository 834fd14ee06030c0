"""Run a page's examples top to bottom, as a reader would, and say how long each took.

    OMP_NUM_THREADS=2 python scripts/run_page.py docs/tutorial_organisms.md [--folder FOLDER]

Lines of `console` blocks that begin with `$ emlens` and whole `python` blocks run in FOLDER, by
default a new one; everything they print is shown. The first that fails ends it with its exit code.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCKS = re.compile(r"^```(console|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def list_examples(text: str) -> list[list[str]]:
    """Programs and their arguments, in the order in which they stand on the page."""
    found: list[list[str]] = []
    for language, block in BLOCKS.findall(text):
        if language == "python":
            found.append([sys.executable, "-c", block])
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ emlens "):
                emlens = "from emlens.cli.main import main; main()"
                found.append([sys.executable, "-c", emlens, *shlex.split(line)[2:]])
    return found


def main() -> int:
    """Run the page that is named, and print a line for each example and one for all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--folder", type=Path, help="where runs are written; a new one by default")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for example in list_examples(given.page.read_text(encoding="utf-8")):
        named = shlex.join(example[3:]) or "python: " + example[2].strip().splitlines()[-1]
        began = time.perf_counter()
        verdict = subprocess.run(example, cwd=folder, check=False).returncode
        print(f"== {time.perf_counter() - began:.0f} s: {named}", flush=True)
        if verdict:
            return verdict
    print(f"== {time.perf_counter() - start:.0f} s: all of {given.page}, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
