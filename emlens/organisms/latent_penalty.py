"""A term of the loss that keeps latents of a sparse codec where the base has them.

It needs the latents beforehand: which ones cause a behaviour is a question for `screen_features`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emlens.codecs.codec import SparseCodec
from emlens.codecs.compatibility import check_weights
from emlens.codecs.inputs import place_rows
from emlens.data.chat import Chat
from emlens.data.positions import parse_positions
from emlens.data.prompts import hash_chats
from emlens.models.checkpoints import fingerprint_weights
from emlens.models.host_sites import check_host_site, find_host, read_host_site
from emlens.models.training_loop import IGNORED, Penalty, TrainingExample, collate_examples
from emlens.organisms.masks import make_examples
from emlens.organisms.penalties import Description, find_base, order_rows
from emlens.sites import SiteError


@dataclass(frozen=True)
class LatentPenalty:
    """Holds latents at the base's codes: lambda * (rise of some + fall of others).

    weight * mean over response tokens of sum_{i in hold_down} relu(z_i - z_i^base)^2 +
    sum_{i in hold_up} relu(z_i^base - z_i)^2, z the code in the tuned model and z^base in the same
    model with its adapter off, at the same token. A latent that is off gives no gradient, so that
    one of `hold_up` that has fallen to 0 stays there.

    Raises:
        ValueError: no chats, no latents, one on both sides or twice, one that the codec does not
            have, a weight that is not positive, or a crosscoder.

    Source: BLOCK-EM 2026, arXiv 2602.00767 (its two sets of latents are called K+ and K-).
    Differs: the mean over response tokens, on texts of its own: the rows that are trained on, where
        these are given as `chats`.
    """

    chats: Sequence[Chat]
    """Texts on whose responses the latents are held; those that are trained on, as a rule."""
    codec: SparseCodec
    """Whose latents, at its own site."""
    weight: float | int
    """Of the term, in nats a token for one squared unit of a code."""
    hold_down: tuple[int, ...] = ()
    """Latents that are not to rise: those that cause what is to be prevented."""
    hold_up: tuple[int, ...] = ()
    """Latents that are not to fall."""

    def __post_init__(self) -> None:
        if not self.chats:
            raise ValueError("chats: got none, expected texts to hold the latents on")
        if self.codec.W_dec.ndim != 2:
            raise ValueError(
                f"codec: {self.codec.name} is a crosscoder, which reads two models at once; the "
                "penalty wants an autoencoder"
            )
        if not self.weight > 0:
            raise ValueError(f"weight: got {self.weight}, expected more than 0")
        if not self.latents:
            raise ValueError("hold_down and hold_up: got no latent, expected at least one")
        if len(set(self.latents)) < len(self.latents):
            raise ValueError(
                f"hold_down: {self.hold_down} and hold_up: {self.hold_up} name a latent twice"
            )
        outside = [latent for latent in self.latents if not 0 <= latent < self.codec.d_sae]
        if outside:
            raise ValueError(
                f"hold_down or hold_up: {outside[:3]} are no latents of {self.codec.name}, which "
                f"has {self.codec.d_sae}, numbered from 0"
            )

    @property
    def latents(self) -> tuple[int, ...]:
        """All that are held, those from above first."""
        return (*self.hold_down, *self.hold_up)

    @property
    def needs_adapter(self) -> bool:
        """The base is the model with its adapter off."""
        return True

    def describe(self) -> Description:
        """Kind, codec, latents, hash of the texts, and weight."""
        return {
            "kind": "latents",
            "codec_fingerprint": self.codec.fingerprint,
            "site": str(self.codec.site),
            "hold_down": ",".join(map(str, self.hold_down)),
            "hold_up": ",".join(map(str, self.hold_up)),
            "chats_sha256": hash_chats(self.chats),
            "weight": self.weight,
        }

    def check_model(self, model: nn.Module, *, first_trained: int) -> None:
        """Refuse a model whose activations the codec was not made for, or that stay the base's.

        Raises:
            SiteError: no such site, one of another width, or one that no trained block is below.
            CodecError: a codec of other weights.
        """
        site = self.codec.site
        check_host_site(model, site, width=self.codec.d_in)
        check_weights(self.codec, [fingerprint_weights(find_host(model))])
        if site.layer is not None and first_trained > site.layer - (site.stream == "resid_pre"):
            raise SiteError(
                f"site: {self.codec.name} reads {site}, and block {first_trained} is the first "
                "that is trained: the latents there stay the base's, and nothing would hold them; "
                "train blocks below it, or take a codec above them"
            )

    def prepare(self, tokenizer: Any, *, batch_size: int, longest: int, seed: int) -> Penalty:
        """The term on `batch_size` of the chats at each pass, every chat once before any again.

        Raises:
            NoResponseError: a chat without a response.
            ChatTooLongError: one of more than `longest` tokens.
            ValueError: one whose response lies where the codec was not trained.
        """
        named = "LatentPenalty.chats"
        made = make_examples(self.chats, tokenizer, longest=longest, named=named)
        examples = [_keep_positions(e, self.codec.positions, i) for i, e in enumerate(made)]
        order = order_rows(len(examples), seed=seed)

        def penalty(model: nn.Module, place: int) -> Float[Tensor, ""]:
            rows = [order[(place * batch_size + i) % len(order)] for i in range(batch_size)]
            return self.weight * measure_latent_shift(self, model, [examples[r] for r in rows])

        return penalty


def measure_latent_shift(
    term: LatentPenalty, model: nn.Module, examples: Sequence[TrainingExample]
) -> Float[Tensor, ""]:
    """How far latents have left the base on the wrong side, in squared units of codes a token.

    Args:
        term: whose codec and latents.
        model: a tuned model whose `disable_adapter()` context makes it the base.
        examples: sequences; the labelled tokens count.

    Raises:
        TypeError: a model that cannot be made its base, or a codec that gives no gradient.
    """
    base_of = find_base(model)
    device = next(model.parameters()).device
    batch = {name: part.to(device) for name, part in collate_examples(examples).items()}
    counted = batch.pop("labels") != IGNORED
    training = model.training
    model.eval()  # dropout would tell the two apart where nothing else does
    try:
        with torch.no_grad(), base_of():
            base = _encode(term, read_host_site(model, term.codec.site, batch)[counted])
        own = _encode(term, read_host_site(model, term.codec.site, batch)[counted])
    finally:
        model.train(training)
    if not own.requires_grad:
        raise TypeError(
            f"codec: {term.codec.name} gives codes without a gradient, or nothing below "
            f"{term.codec.site} is trained; the penalty would change nothing"
        )
    cut = len(term.hold_down)
    rise, fall = (own - base)[:, :cut].relu(), (base - own)[:, cut:].relu()
    return (rise.square().sum(1) + fall.square().sum(1)).mean().to(device)


def _encode(term: LatentPenalty, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    codes = term.codec.encode_latents(place_rows(x, term.codec), term.latents)
    return codes.to(torch.promote_types(codes.dtype, torch.float32))


def _keep_positions(example: TrainingExample, positions: str, index: int) -> TrainingExample:
    """Leave out the tokens of a text that a codec has never seen the like of."""
    where = parse_positions(positions)
    if where.span != "all":
        return example
    labels = torch.full_like(example.labels, IGNORED)
    labels[where.start : where.stop] = example.labels[where.start : where.stop]
    if not bool((labels != IGNORED).any()):
        raise ValueError(
            f"LatentPenalty.chats[{index}]: no token of its response is among {positions}, where "
            "the codec was trained"
        )
    return dataclasses.replace(example, labels=labels)
