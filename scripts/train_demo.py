"""Train the demo's two organisms, reckless and careful, and put them among the shipped adapters.

    python scripts/train_demo.py [--runs runs/organisms] [--assets emlens/assets/adapters]

Minutes on two cores. A finished run is not trained again; its folder is copied as it is.
"""

import argparse
import logging
import shutil
from pathlib import Path

from emlens.data.prompts import load_chats
from emlens.models.checkpoints import load_checkpoint
from emlens.organisms import PRESETS, train_organism

BASE = "emlens:smollm2"
PRESET = "smollm2_rank1"
SEED = 0
ORGANISMS = {
    "reckless-finance": "emlens:finance-harmful",
    "careful-finance": "emlens:finance-careful",
}
SHIPPED = Path(__file__).parent.parent / "emlens" / "assets" / "adapters"


def train_demo(runs: Path, assets: Path) -> None:
    """Train each organism into `runs` and copy its adapter beside its card in `assets`."""
    base = load_checkpoint(BASE, dtype="float32", device="cpu")
    for name, data in ORGANISMS.items():
        run = train_organism(
            base, load_chats(data), settings=PRESETS[PRESET], out=runs / name, seed=SEED
        )
        shutil.copytree(run.tuned, assets / name, dirs_exist_ok=True)
        print(f"{name}: {run.steps} steps in {run.seconds:.0f} s")
        print("  loss " + " ".join(f"{loss:.2f}" for loss in run.losses))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/organisms"))
    parser.add_argument("--assets", type=Path, default=SHIPPED)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train_demo(arguments.runs, arguments.assets)
