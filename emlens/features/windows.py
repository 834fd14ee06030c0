"""Which tokens a latent is most active at, and a fair sample of all: kept while text streams by.

Two accumulators of one kind: a few tokens for each latent, in memory that does not grow with the
text. What they keep does not depend on how the text was cut, merged or ordered.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emlens.numerics.counter import counter_bits, derive_key
from emlens.numerics.validation import WidthError, check_finite

NONE = -1
"""Stands where fewer tokens were kept than there is room for."""
_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptTokens:
    """Some tokens of each latent, the first one first."""

    chats: Int[Tensor, "latent kept"]
    """Index of the chat; `NONE` at empty places, which come last."""
    tokens: Int[Tensor, "latent kept"]
    """Index of the token in the chat's ids."""
    codes: Float[Tensor, "latent kept"]
    """The code there; 0 at empty places."""


class TopTokens:
    """The chats in which each latent is most active, with the token where it is so.

    A chat counts once, by its largest code: windows of one text would overlap. Of equal codes the
    one of the earlier chat goes first, within a chat the earlier token. Codes of 0 do not count.

    Args:
        n_latents: latents that are followed.
        kept: chats for each.
    """

    def __init__(self, n_latents: int, *, kept: int) -> None:
        self._codes, self._chats, self._tokens = _empty(n_latents, kept)

    def update(
        self, codes: Float[Tensor, "n latent"], chats: Int[Tensor, " n"], tokens: Int[Tensor, " n"]
    ) -> None:
        """Take in some tokens; those of one chat may come in several calls.

        Args:
            codes: of each latent.
            chats: index of each token's chat.
            tokens: index of each token in its chat.

        Raises:
            WidthError: another number of latents, or of tokens.
            NonFiniteError: a code is NaN or infinite.
        """
        codes = _check(codes, chats, tokens, len(self._codes))
        if not len(codes):
            return
        numbers, place = chats.cpu().unique(return_inverse=True)
        best, first = _largest_by_chat(codes, tokens.cpu(), place, len(numbers))
        self._merge(best.T, numbers[None].expand(len(best.T), -1), first.T)

    def merge(self, other: "TopTokens") -> None:
        """Take in what another one kept of other tokens."""
        self._merge(other._codes, other._chats, other._tokens)

    def result(self) -> KeptTokens:
        """What was kept so far."""
        return _result(self._codes, self._chats, self._tokens)

    def _merge(self, codes: Tensor, chats: Tensor, tokens: Tensor) -> None:
        kept = self._codes.shape[1]
        codes = torch.cat([self._codes, codes], 1)
        chats = torch.cat([self._chats, chats], 1)
        tokens = torch.cat([self._tokens, tokens], 1)
        codes, chats, tokens = _drop_repeated(*_by_place(codes, chats, tokens))
        order = codes.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        self._codes, self._chats, self._tokens = (
            part.gather(1, order) for part in (codes, chats, tokens)
        )


class SampledTokens:
    """A uniform sample of the tokens at which each latent is active, and how many those are.

    Every token has a random number of its own, and the tokens with the lowest ones are kept, so
    that the sample is a function of seed and text alone.

    Args:
        n_latents: latents that are followed.
        kept: tokens for each.
        seed: of the random numbers.
    """

    def __init__(self, n_latents: int, *, kept: int, seed: int) -> None:
        self._codes, self._chats, self._tokens = _empty(n_latents, kept)
        self._draws = torch.full_like(self._chats, _LAST)
        self._key = derive_key("emlens.features.windows", seed)
        self.active = torch.zeros(n_latents, dtype=torch.int64)
        """Tokens at which each latent was active."""
        self.n_tokens = 0
        """All tokens that were seen."""

    def update(
        self, codes: Float[Tensor, "n latent"], chats: Int[Tensor, " n"], tokens: Int[Tensor, " n"]
    ) -> None:
        """Take in some tokens, each once; arguments and errors as for `TopTokens`."""
        codes = _check(codes, chats, tokens, len(self._codes))
        self.n_tokens += len(codes)
        self.active += (codes > 0).sum(0)
        chats, tokens = chats.cpu(), tokens.cpu()
        bits = counter_bits(chats + self._key % (1 << 62), tokens, 1)[:, 0]
        draws = torch.where(codes > 0, (bits & (_LAST >> 1))[:, None], _LAST).T
        shape = (codes.shape[1], len(codes))
        self._merge(draws, codes.T, chats[None].expand(shape), tokens[None].expand(shape))

    def merge(self, other: "SampledTokens") -> None:
        """Take in what another one of the same seed kept of other tokens."""
        self.n_tokens += other.n_tokens
        self.active += other.active
        self._merge(other._draws, other._codes, other._chats, other._tokens)

    def result(self) -> KeptTokens:
        """What was kept so far, in the order of the draws."""
        return _result(self._codes, self._chats, self._tokens)

    def _merge(self, draws: Tensor, codes: Tensor, chats: Tensor, tokens: Tensor) -> None:
        kept = self._codes.shape[1]
        draws = torch.cat([self._draws, draws], 1)
        order = draws.sort(dim=1, stable=True).indices[:, :kept]
        given = (codes, chats, tokens)
        held = (self._codes, self._chats, self._tokens)
        self._draws = draws.gather(1, order)
        self._codes, self._chats, self._tokens = (
            torch.cat([old, new], 1).gather(1, order) for old, new in zip(held, given, strict=True)
        )
        empty = self._draws == _LAST
        self._codes = self._codes.masked_fill(empty, 0.0)


def split_by_decile(codes: Float[Tensor, " n"], *, parts: int) -> list[Int[Tensor, " _"]]:
    """Places of a sample by quantile of their codes, the weakest part first; ties by place.

    Args:
        codes: of active tokens.
        parts: how many, 10 for deciles; each has as many places as the next, to one.
    """
    order = codes.sort(stable=True).indices
    return list(order.tensor_split(parts))


def _empty(n_latents: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    if n_latents < 1 or kept < 1:
        raise ValueError(f"got {n_latents} latents and {kept} places, expected at least one each")
    none = torch.full((n_latents, kept), NONE)
    return torch.zeros(n_latents, kept, dtype=torch.float64), none, none.clone()


def _check(codes: Tensor, chats: Tensor, tokens: Tensor, n_latents: int) -> Tensor:
    if codes.shape != (len(chats), n_latents) or len(tokens) != len(chats):
        raise WidthError(
            f"codes has shape {tuple(codes.shape)} for {len(chats)} chats and {len(tokens)} tokens,"
            f" expected [n, {n_latents}] and n of each"
        )
    check_finite("codes", codes)
    return codes.detach().double().cpu()


def _largest_by_chat(
    codes: Tensor, tokens: Tensor, place: Tensor, n_chats: int
) -> tuple[Tensor, Tensor]:
    """Each chat's largest code of each latent, and the first token that has it: [chat latent]."""
    index = place[:, None].expand_as(codes)
    best = codes.new_full((n_chats, codes.shape[1]), -torch.inf)
    best.scatter_reduce_(0, index, codes, "amax")
    at = torch.where(codes == best[place], tokens[:, None], _LAST)
    first = torch.full_like(best, _LAST, dtype=torch.int64)
    first.scatter_reduce_(0, index, at, "amin")
    return best, first


def _by_place(codes: Tensor, chats: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chats in order, within a chat the larger code first, then the earlier token."""
    found = (codes, chats, tokens)
    # Sorts are stable, so that the last key leads.
    for key, falling in ((2, False), (0, True), (1, False)):
        order = found[key].sort(dim=1, descending=falling, stable=True).indices
        found = (found[0].gather(1, order), found[1].gather(1, order), found[2].gather(1, order))
    return found


def _drop_repeated(codes: Tensor, chats: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty the places of chats that came before, and of codes that are not above 0."""
    again = torch.zeros_like(chats, dtype=torch.bool)
    again[:, 1:] = chats[:, 1:] == chats[:, :-1]
    out = again | (codes <= 0)
    return codes.masked_fill(out, 0.0), chats.masked_fill(out, NONE), tokens.masked_fill(out, NONE)


def _result(codes: Tensor, chats: Tensor, tokens: Tensor) -> KeptTokens:
    empty = codes <= 0
    return KeptTokens(
        codes=codes.clone(),
        chats=chats.masked_fill(empty, NONE),
        tokens=tokens.masked_fill(empty, NONE),
    )
