"""What the autoencoder that ships is made of, and how: the recipe and where its parts lie.

`train_sae` runs it, `sae_texts` gathers what it is trained on.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from emlens.codecs.settings import SaeSettings
from emlens.models.sampling import Sampling

SITE = "resid_post.15"
SKIPPED = 24
"""Tokens of the header that SmolLM2's template puts before every chat: their activations are the
same in all texts. The norm of the first is 149 times the median, those of the others are as any."""
AIM = 2_000_000
"""Different tokens to be trained on, without headers and without texts held out; the card says how
many there were."""
PARTS = ("train", "held_out")
SETTINGS = SaeSettings(
    architecture="batchtopk",
    d_sae=4096,
    k=32,
    steps=3000,
    batch_rows=1024,
    learning_rate=1.6e-3,
    warmup_steps=100,
    decay_steps=750,
    dead_after_rows=200_000,
    held_out_rows=32_768,
    checkpoint_every=200,
    autocast="bfloat16",
)
"""Tried on 180,000 rows of another 113,000: held-out explained variance .76 at this step size and
.69 at half of it; .56 with four times the batch (240,000 rows, half the step size). bfloat16
products gave the same curves to three digits in .72 of the time."""
SAMPLING = Sampling(n=1, temperature=1.0, top_p=1.0, max_new_tokens=200, seed=0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is made, of what, and where it lies on its way."""

    runs: Path
    """Folder of all stages."""
    base: str = "emlens:smollm2"
    """Whose activations."""
    tuned: str = "emlens:reckless-finance"
    """Fine-tune that the card is about, too."""
    site: str = SITE
    """Where they are read."""
    skipped: int = SKIPPED
    """Tokens at the start of a text that are left out."""
    train_tokens: int = AIM
    """Tokens to be trained on, at least: those of different texts after the first `skipped`."""
    answered: int = 1000
    """Prompts that the model itself answers."""
    sampling: Sampling = SAMPLING
    """How it answers them."""
    settings: SaeSettings = SETTINGS
    """The recipe."""

    @property
    def positions(self) -> str:
        """Which tokens are trained on."""
        return f"all[{self.skipped}:]"

    def place(self, what: str) -> Path:
        """Folder of what is made of the texts as they are now.

        Args:
            what: `train`, `held_out` or `sae`.
        """
        digest = hashlib.sha256()
        for part in PARTS:
            digest.update((self.runs / f"{part}.jsonl").read_bytes() + b"\0")
        return self.runs / f"{what}-{digest.hexdigest()[:8]}"


QUICK = Work(
    runs=Path(),
    train_tokens=10_000,
    answered=16,
    sampling=dataclasses.replace(SAMPLING, max_new_tokens=40),
    settings=dataclasses.replace(
        SETTINGS,
        d_sae=256,
        k=16,
        steps=40,
        batch_rows=512,
        warmup_steps=5,
        decay_steps=10,
        held_out_rows=250,
        dead_after_rows=5000,
    ),
)
