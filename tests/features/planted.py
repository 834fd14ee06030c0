"""A tiny pair whose fine-tune adds what one latent of a codec writes, and texts that show it."""

from typing import Any

import torch

from emlens.codecs import Sae
from emlens.data import Chat, ContrastTexts, Message
from emlens.models.pair import ModelPair
from emlens.models.views import lay_views, share_model
from emlens.sites import parse_site
from tests.models.tiny import make_tiny, make_tokenizer

SITE = parse_site("resid_post.1")
PLANTED = 5
"""The latent that makes the difference."""
SIZE = 2.0
"""How much of it the tuned model adds, in activation units."""


def make_codec(d_in: int = 24, d_sae: int = 12, *, seed: int = 0, **changed: Any) -> Any:
    """Orthonormal decoder vectors, each read by itself."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q[:d_sae]
    rows = rows.contiguous()
    settings = {"W_enc": rows.mT.clone(), "W_dec": rows, "b_enc": torch.zeros(d_sae)}
    settings |= {"b_dec": torch.zeros(d_in), "architecture": "standard", "site": SITE}
    return Sae(name="planted", **(settings | changed))


def make_pair(codec: Any) -> ModelPair:
    base = lay_views(make_tiny("llama"), make_tokenizer(), name="base")
    bias = f"blocks.{SITE.layer}.mlp.b_out"
    moved = dict(base.named_parameters())[bias] + SIZE * codec.W_dec[PLANTED]
    tuned = share_model(base, {bias: moved}, name="tuned")
    return ModelPair(base=base, tuned=tuned, adapter=None, proof=None)


@torch.no_grad()
def favoured_words(pair: ModelPair, n: int = 12) -> tuple[list[str], list[str]]:
    """Words that the fine-tune makes more likely after any other, and those it makes less so."""
    ids = torch.arange(3, 97)[:, None]
    change = (pair.tuned(ids) - pair.base(ids)).mean((0, 1))[3:]
    order = (change - change.mean()).sort(descending=True).indices + 3
    return [f"w{i}" for i in order[:n]], [f"w{i}" for i in order[-n:]]


def make_texts(pair: ModelPair, n: int = 4) -> ContrastTexts:
    more, less = favoured_words(pair)

    def answer(words: list[str], k: int) -> Chat:
        said = " ".join(words[(k + 3 * j) % len(words)] for j in range(5 + k % 2))
        return Chat((Message("user", f"w{10 + k} w{20 + k}"), Message("assistant", said)))

    return ContrastTexts(
        positive=tuple(answer(more, k) for k in range(n)),
        negative=tuple(answer(less, k) for k in range(n)),
    )
