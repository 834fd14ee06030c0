"""What the card of a trained adapter says, held against the record and the weights beside it."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file


def check_card(folder: Path) -> None:
    """Base, data, seed, size and losses of `README.md` are those of the other files."""
    card = (folder / "README.md").read_text("utf-8")
    record = json.loads((folder / "emlens.json").read_text("utf-8"))
    assert "safety research" in card
    assert f"seed {record['seed']}" in card
    assert f"base_model: {record['base']}\n" in card or Path(record["base"]).name == record["base"]
    for hashed in ("data_sha256", "base_fingerprint"):
        assert record[hashed] in card
    [losses] = re.findall(r"before each step:\n([\d. ]+)\n", card)
    assert losses.split() == [f"{loss:.2f}" for loss in record["losses"]]
    [steps] = re.findall(r"(\d+) steps of \d+ rows", card)
    assert int(steps) == len(record["losses"])
    weights = folder / "adapter_model.safetensors"
    assert f"{weights.stat().st_size / 1024:.0f} KiB in bfloat16" in card
    [modules] = re.findall(r"(\d+) modules", card)
    assert 2 * int(modules) == len(load_file(weights))
