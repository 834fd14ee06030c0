"""What cards of shipped weights say, held against the records and weights beside them."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file

from emlens.codecs import Sae, load_sae


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


def check_sae_card(folder: Path) -> Sae:
    """What `README.md` says of an autoencoder is so; returned as it is stored."""
    card = (folder / "README.md").read_text("utf-8")
    sae = load_sae(folder, dtype="auto", device="cpu")
    assert "safety-research" in card
    assert f"base_model: {sae.base_name}\n" in card
    assert f"| base | `{sae.base_name}`, fingerprint `{sae.base_fingerprint}` |" in card
    [site, width, skipped] = _find(
        r"\| site \| `([\w.]+)`, width (\d+); the first (\d+) tokens", card
    )
    assert (site, int(width)) == (str(sae.site), sae.d_in)
    assert sae.positions == f"all[{skipped}:]"
    [latents, threshold, dtype] = _find(
        r"\| autoencoder \| (\d+) latents, BatchTopK with k \d+, threshold ([\d.]+); (\w+) \|", card
    )
    assert (int(latents), f"torch.{dtype}") == (sae.d_sae, str(sae.W_dec.dtype))
    assert sae.threshold is not None
    assert {float(threshold)} == {float(f"{float(one):.4g}") for one in sae.threshold}
    assert f'load_sae("emlens:{folder.name}")' in card
    [trained, against, aim, texts] = _find(
        r"trained on ([\d,]+) tokens, ([a-z ]+ than) the ([\d,]+) that"
        r"(?:.|\n)*? have ([\d,]+): there",
        card,
    )
    trained, aim, texts = (int(one.replace(",", "")) for one in (trained, aim, texts))
    [_, chats] = _find(r"\| (texts) \| (\d+) chats", card)
    assert against == ("fewer than" if trained < aim else "no fewer than")
    assert texts == trained + int(chats) * int(skipped)
    return sae


def read_fits(card: str) -> dict[str, tuple[float, float, float]]:
    """Explained variance, L0 and dead share of each model of a card."""
    rows = re.findall(r"^\| `(\S+)` \| (-?[\d.]+) \| ([\d.]+) \| ([\d.]+)% \| \d+ \|$", card, re.M)
    return {name: (float(ev), float(l0), float(dead) / 100) for name, ev, l0, dead in rows}


def _find(pattern: str, text: str) -> tuple[str, ...]:
    [found] = re.findall(pattern, text)
    return found
