"""Latents by how much a model's misaligned responses rest on them, to first order; one model only.

Cheap, and for every latent at once. To see what happens when a latent is really moved, screen it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs import SparseCodec, check_fits
from emlens.data import Batching, ContrastTexts, prompt_hash, tokenize_chat
from emlens.features.accumulate import FeatureAccumulator
from emlens.features.health import explain_variance
from emlens.features.rank import FeatureRanking
from emlens.features.reading import count_rows
from emlens.features.results import is_underpowered
from emlens.features.steering import require_autoencoder
from emlens.models.response_gradients import read_response_gradients
from emlens.models.tokenizer_needs import require_tokenizer
from emlens.models.views import origin_of
from emlens.numerics.projection import unit_vectors
from emlens.numerics.validation import check_samples

CHUNK = 1 << 24
"""Values made at a time of latents times width: 128 MiB in float64."""


def attribute_features(
    model: Any,
    codec: SparseCodec,
    *,
    texts: ContrastTexts,
    batching: Batching = Batching(tokens=4096),  # noqa: B008 - frozen
) -> FeatureRanking:
    """Attribute a model's misaligned responses, less its aligned ones, to every latent.

    At each response token -(g . d)((a - mean a) . d), with a the activation at the codec's site, g
    the gradient of the response's cross-entropy (nats, summed) and d the latent's unit decoder
    vector: to first order, what the cross-entropy rises by when the component along d is held at
    its mean there. Averaged over the tokens of a response; the mean of the misaligned responses to
    a prompt less that of the aligned ones; averaged over prompts. The mean of a is that of all
    response tokens of both classes. High scores belong to what the misaligned responses rest on.
    At the same tokens the codec is held against the activations: `underpowered`.

    Args:
        model: the fine-tune, as a rule; loaded by emlens, with its tokenizer.
        codec: whose latents.
        texts: answered chats of both classes; every prompt must be answered in both
            (`pair_by_prompt`).
        batching: tokens run at once.

    Raises:
        NonFiniteError: an activation or a code is NaN or infinite.
        CodecError: a codec that does not fit the model, or of other weights: those of a full
            fine-tune are others than its base's.
        ValueError: a prompt that is answered in one class only, or a response without a token.

    Source: OpenAI, December 2025, SAE latent attribution.
    Differs: sums of g a^T, of g and of a are kept instead of tokens or codes, d_in x d_in numbers;
        the attribution of a latent is then a quadratic form of its vector.
    """
    require_autoencoder(codec)
    check_fits(codec, model.cfg, weights=origin_of(model).lineage)
    tokenizer: Any = require_tokenizer(model.tokenizer, origin_of(model).name)
    given = (*texts.positive, *texts.negative)
    chats = [tokenize_chat(chat, tokenizer) for chat in given]
    empty = [k for k, c in enumerate(chats) if c.response is None or c.response[0] >= c.response[1]]
    if empty:
        raise ValueError(f"texts: the response of chat {empty[0]} (positive first) has no token")
    weights = _weigh(texts)
    sums = AttributionSums(codec.d_in)
    fit = FeatureAccumulator(1, n_prompts=1, d_in=codec.d_in, d_sae=codec.d_sae, keep_codes=False)

    def count(row: int, x: Tensor, gradient: Tensor) -> None:
        sums.update(x, gradient, weight=weights[row])
        together = torch.zeros(len(x), dtype=torch.long)
        count_rows(fit, codec, prompts=together, x=x.detach()[None])

    read_response_gradients(model, chats, site=codec.site, visit=count, batching=batching)
    scores = sums.result(codec.W_dec)
    order = scores.argsort(descending=True, stable=True)
    return FeatureRanking(
        by="attribution",
        latents=order,
        scores=scores[order],
        codec=codec.name,
        codec_fingerprint=codec.fingerprint,
        models=(origin_of(model).name,),
        underpowered=is_underpowered(explain_variance(fit.models[0].result())[None]),
    )


def pair_by_prompt(texts: ContrastTexts) -> ContrastTexts:
    """Keep the texts whose prompts are answered in both classes.

    Raises:
        ContrastError: there is none.
    """
    both = {prompt_hash(c) for c in texts.positive} & {prompt_hash(c) for c in texts.negative}
    return ContrastTexts(
        positive=tuple(c for c in texts.positive if prompt_hash(c) in both),
        negative=tuple(c for c in texts.negative if prompt_hash(c) in both),
    )


@dataclass
class AttributionSums:
    """Weighted sums over tokens from which every direction's attribution follows.

    They lie where the activations do: d_in x d_in numbers, too many to bring over for every
    response.
    """

    d_in: int

    def __post_init__(self) -> None:
        self._products = torch.zeros(self.d_in, self.d_in, dtype=torch.float64)
        self._gradients = torch.zeros(self.d_in, dtype=torch.float64)
        self._activations = torch.zeros(self.d_in, dtype=torch.float64)
        self._n = 0

    def update(
        self, x: Float[Tensor, "n d"], gradient: Float[Tensor, "n d"], *, weight: float
    ) -> None:
        """Take in the tokens of one response.

        Args:
            x: activations.
            gradient: of the response's cross-entropy, at the same tokens.
            weight: of the response; its tokens are averaged first.
        """
        for name, given in (("x", x), ("gradient", gradient)):
            check_samples(name, given, self.d_in)
        if not len(x):
            return
        own, slope = x.double(), gradient.double() * (weight / len(x))
        self._move(x.device)
        self._add(slope.mT @ own, slope.sum(0), own.sum(0), len(x))

    def merge(self, other: "AttributionSums") -> None:
        """Take in the sums over other tokens, of any device; they stay as they were."""
        if not self._n:
            self._move(other._products.device)
        self._add(other._products, other._gradients, other._activations, other._n)

    def _move(self, device: torch.device) -> None:
        self._products = self._products.to(device)
        self._gradients = self._gradients.to(device)
        self._activations = self._activations.to(device)

    def _add(self, products: Tensor, gradients: Tensor, activations: Tensor, n: int) -> None:
        device = self._products.device
        self._products += products.to(device)
        self._gradients += gradients.to(device)
        self._activations += activations.to(device)
        self._n += n

    def result(self, directions: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
        """The attribution of each direction, of any length but zero; 0 for one of zero.

        -d^T (sum g a^T - (sum g) (mean a)^T) d with d of length 1.

        Returns:
            On the CPU, wherever the sums and the directions lie.
        """
        mean = self._activations / max(self._n, 1)
        centred = self._products - torch.outer(self._gradients, mean)
        found = [
            ((unit @ centred) * unit).sum(1)
            for rows in directions.split(max(1, CHUNK // self.d_in))
            for unit in [unit_vectors(rows.detach().to(centred)).nan_to_num()]
        ]
        return -torch.cat(found).cpu()


def _weigh(texts: ContrastTexts) -> list[float]:
    """What each response counts, positive ones first: 1 / (prompts x answers of its class)."""
    names = [[prompt_hash(chat) for chat in chats] for chats in (texts.positive, texts.negative)]
    first, second = map(set, names)
    if first != second:
        alone = len(first ^ second)
        raise ValueError(
            f"texts: {alone} of {len(first | second)} prompts are answered in one class only, and "
            "responses are compared prompt by prompt; keep the others with pair_by_prompt(texts)"
        )
    return [
        sign / (len(first) * own.count(name))
        for sign, own in zip((1.0, -1.0), names, strict=True)
        for name in own
    ]
