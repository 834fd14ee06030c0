"""Codes of some latents, prompt by prompt: what is followed along a training or over bad data.

Not for all latents (`compare_features`), nor for single tokens (`explain_features`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.artifacts import Result
from emlens.codecs import SparseCodec
from emlens.codecs.inputs import place_rows
from emlens.data import Batching, Chat
from emlens.features.encode import split_rows
from emlens.features.reading import TASK, group_by_prompt, plan_codes
from emlens.models.reading import Readable, count_models, identify
from emlens.numerics.validation import check_finite
from emlens.sites import Site


@dataclass(frozen=True, kw_only=True)
class LatentCodes(Result):
    """Mean codes of some latents on each prompt."""

    kind: ClassVar[str] = "latent_codes"

    base: str
    """The base's source, or the only model's."""
    base_fingerprint: str
    tuned: str | None
    """The fine-tune's source, of a pair."""
    tuned_fingerprint: str | None
    """Of a full checkpoint."""
    adapter_fingerprint: str | None
    codec: str
    """The codec's source."""
    codec_fingerprint: str
    site: str
    positions: str
    streams: tuple[str, ...]
    """`model`, or `base` and `tuned`."""
    prompts: tuple[str, ...]
    """Hashes of the prompts."""
    latents: Int[Tensor, " latent"]
    codes: Float[Tensor, "stream prompt latent"]
    """Mean code over the prompt's tokens."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a latent: its mean over prompts in each model."""
        means = self.codes.mean(1)
        return [
            {"latent": latent}
            | {stream: float(means[i, k]) for i, stream in enumerate(self.streams)}
            for k, latent in enumerate(self.latents.tolist())
        ]


def read_latents(
    model: Readable,
    codec: SparseCodec,
    *,
    latents: Sequence[int],
    chats: Sequence[Chat | str],
    positions: str | None = None,
    batching: Batching = Batching(),  # noqa: B008 - frozen
) -> LatentCodes:
    """Read the mean codes of some latents on each prompt.

    Args:
        model: a pair, or one model.
        codec: the codec.
        latents: which.
        chats: prompts (str) or chats; responses to one prompt are averaged, token by token.
        positions: which tokens; by default those that the codec was trained on.
        batching: tokens run at once, both models of a pair counted.

    Raises:
        ValueError: no latent, or one that the codec lacks; as `check_sae` raises.
        NonFiniteError: a code is NaN or infinite.
    """
    chosen = list(latents)
    if not chosen or not all(0 <= latent < codec.d_sae for latent in chosen):
        raise ValueError(
            f"latents: got {chosen[:10]}, expected some from 0 to {codec.d_sae - 1}, those of "
            f"{codec.name}"
        )
    plan = plan_codes(model, codec, chats, positions=positions, batching=batching)
    prompts, names = group_by_prompt(chats)
    n_models = count_models(model)
    sums = torch.zeros(n_models, len(names), len(chosen), dtype=torch.float64)
    n_tokens = torch.zeros(len(names), dtype=torch.float64)

    def count(site: Site, x: Tensor, selections: tuple) -> None:
        own = prompts[selections[0].rows]
        n_tokens.index_add_(0, own, torch.ones(len(own), dtype=torch.float64))
        for total, rows in zip(sums, selections[0].take(x), strict=True):
            for part in split_rows(len(rows), codec.d_sae, device=codec.W_dec.device.type):
                chunk = place_rows(rows[part], codec)
                total.index_add_(0, own[part], codec.encode_latents(chunk, chosen).double().cpu())

    for _ in plan.read(count, TASK):
        pass
    check_finite("codes", sums)
    identity = identify(model)
    return LatentCodes(
        base=identity.base,
        base_fingerprint=identity.base_fingerprint,
        tuned=identity.tuned,
        tuned_fingerprint=identity.tuned_fingerprint,
        adapter_fingerprint=identity.adapter_fingerprint,
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        site=str(codec.site),
        positions=str(plan.positions[0]),
        streams=("base", "tuned") if n_models == 2 else ("model",),
        prompts=names,
        latents=torch.tensor(chosen),
        codes=sums / n_tokens[:, None],
    )
