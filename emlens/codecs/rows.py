"""Activations as a codec is trained on them: batches of one size, rows held out, nothing shuffled.

Batches come in the order in which rows do: what is given in the order of texts is learnt in it.
`emlens.activations.shuffle_activations` mixes what was captured.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.codec import CodecError
from emlens.codecs.settings import CodecSettings
from emlens.sites import Site


class CorpusTooSmallError(CodecError):
    """Fewer rows than a run needs; how many there are and how many are needed is named."""


@runtime_checkable
class ActivationSource(Protocol):
    """Activations that know where they are from and can be read from any row on."""

    @property
    def site(self) -> Site:
        """Where they were read."""
        ...

    @property
    def positions(self) -> str:
        """At which tokens."""
        ...

    @property
    def base_fingerprint(self) -> str | None:
        """Of the weights of the model, or of the base of a pair."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of all that decides which rows come in which order."""
        ...

    @property
    def n_rows(self) -> int:
        """Rows of one pass."""
        ...

    def rows_from(self, row: int) -> Iterator[Tensor]:
        """All rows from one on, pass after pass without an end: row `n_rows` begins the second."""
        ...


def cut_batches(parts: Iterable[Tensor], rows: int) -> Iterator[Float[Tensor, "... rows d"]]:
    """Cut tensors of any number of rows into batches of one; what is left at the end is dropped."""
    held: list[Tensor] = []
    count = 0
    for part in parts:
        rest = part
        while rest.shape[-2]:
            taken, rest = rest[..., : rows - count, :], rest[..., rows - count :, :]
            held.append(taken)
            count += taken.shape[-2]
            if count == rows:
                yield held[0] if len(held) == 1 else torch.cat(held, dim=-2)
                held, count = [], 0


class TrainingRows:
    """The rows of one run: some held out, the others in batches, from any step on.

    Args:
        activations: tensors [n d_in], or [models n d_in] for a crosscoder, of any number of rows.
        held_out: rows that are not trained on; None takes them off the front of the corpus.
        settings: how many rows at a time, and how often they may come.
        axes: 2, or 3 with an axis of models.

    Raises:
        CorpusTooSmallError: too few rows, as far as can be told without reading them all.
        CodecError: a tensor of another shape, or shuffled activations without others held out.
    """

    def __init__(
        self,
        activations: Iterable[Tensor],
        held_out: Iterable[Tensor] | None,
        *,
        settings: CodecSettings,
        axes: int,
    ) -> None:
        self.settings, self.axes = settings, axes
        self.source = activations if isinstance(activations, ActivationSource) else None
        if self.source is not None and held_out is None:
            raise CodecError(
                "held_out: none was given, and rows that come in a new order in every pass have no "
                "first ones that could be left out; give the second part of their split()"
            )
        self._activations = activations
        self._set_aside = settings.held_out_rows if held_out is None else 0
        self.n_rows = self._count()
        self._check_size(self.n_rows)
        if self.source is not None:
            self._open = self._checked(self.source.rows_from(0))
        else:
            self._open = self._checked(iter(activations))
        self.held_out = self._hold_out(held_out)
        self.first = next(cut_batches(self._peek(settings.batch_rows), settings.batch_rows))
        if self.source is not None:
            self._open = iter(())  # it will be read anew, and holds a buffer

    def batches(self, step: int) -> Iterator[Float[Tensor, "... batch_rows d"]]:
        """Batches from a step on, for as long as there may be any; to be called once.

        Raises:
            CorpusTooSmallError: the rows ended, and came as often as they may.
        """
        rows = self.settings.batch_rows
        if self.source is not None:
            parts = self._checked(self.source.rows_from(step * rows))
            return cut_batches(parts, rows)
        batches = cut_batches(self._passes(), rows)
        for _ in range(step):
            next(batches)
        return batches

    @property
    def positions(self) -> str:
        """Which tokens the rows are of; `all` where nobody says."""
        return "all" if self.source is None else self.source.positions

    @property
    def base_fingerprint(self) -> str | None:
        """Of the weights of the model that they are of, where that is known."""
        return None if self.source is None else self.source.base_fingerprint

    def check_site(self, site: Site) -> None:
        """Refuse a site that the activations are known not to be of.

        Raises:
            CodecError: they are of another.
        """
        if self.source is not None and self.source.site != site:
            raise CodecError(f"site: got {site}, but the activations are of {self.source.site}")

    def describe(self) -> dict[str, Any]:
        """What tells these rows from others, for the plan of a run."""
        known: dict[str, Any] = {}
        if self.source is not None:
            known = {
                "positions": self.positions,
                "base_fingerprint": self.base_fingerprint,
                "fingerprint": self.source.fingerprint,
            }
        return known | {"first": _hash_rows(self.first), "held_out": _hash_rows(self.held_out)}

    def _count(self) -> int | None:
        """Rows of one pass, where that can be told."""
        if self.source is not None:
            return self.source.n_rows
        if isinstance(self._activations, Sequence):
            return sum(part.shape[-2] for part in self._activations) - self._set_aside
        return None

    def _check_size(self, rows: int | None) -> None:
        """Refuse a number of rows that is too small; None for one that is not known."""
        s = self.settings
        if rows is not None and rows * s.max_passes < s.rows:
            raise CorpusTooSmallError(
                f"activations: {max(rows, 0)} rows to train on, {s.max_passes} passes at most "
                f"(max_passes); expected {s.rows} rows (steps x batch_rows). Capture more text, or "
                "ask for fewer steps"
            )
        seen = s.rows if rows is None else min(rows, s.rows)
        if seen * s.k < s.least_firings * s.d_sae:
            raise CorpusTooSmallError(
                f"activations: {seen} rows, in which a latent is active {seen * s.k / s.d_sae:.3g} "
                f"times on average (rows x k / d_sae); expected {s.least_firings} "
                f"(least_firings), so {-(-s.least_firings * s.d_sae // s.k)} rows. Capture "
                "more text, or ask for fewer latents"
            )

    def _hold_out(self, held_out: Iterable[Tensor] | None) -> Tensor:
        """The rows that are held out, as one tensor."""
        wanted = self.settings.held_out_rows
        if held_out is None:
            # What the last part holds beyond them is trained on.
            parts, count = [], 0
            for part in self._open:
                parts.append(part)
                count += part.shape[-2]
                if count >= wanted:
                    break
            if count < wanted:
                raise CorpusTooSmallError(
                    f"activations: {count} rows, and {wanted} are held out (held_out_rows)"
                )
            rows = torch.cat(parts, dim=-2)
            self._open = chain([rows[..., wanted:, :]], self._open)
            return rows[..., :wanted, :].clone()
        found = next(cut_batches(self._checked(iter(held_out), "held_out"), wanted), None)
        if found is None:
            raise CorpusTooSmallError(
                f"held_out: fewer than the {wanted} rows that are asked for (held_out_rows)"
            )
        return found.clone()

    def _peek(self, rows: int) -> list[Tensor]:
        """The first rows that are trained on, which stay to be read."""
        parts, count = [], 0
        for part in self._open:
            parts.append(part)
            count += part.shape[-2]
            if count >= rows:
                break
        if count < rows:
            raise CorpusTooSmallError(f"activations: {count} rows, expected one batch of {rows}")
        self._open = chain(parts, self._open)
        return parts

    def _passes(self) -> Iterator[Tensor]:
        """Rows of one pass after another."""
        parts, done = self._open, 0
        for number in range(1, self.settings.max_passes + 1):
            count = 0
            for part in parts:
                count += part.shape[-2]
                yield part
            done += count
            if number == 1:
                self._check_size(count)
            parts = self._after_held_out(self._checked(iter(self._activations)))
        raise CorpusTooSmallError(
            f"activations: ended after {done} rows, expected {self.settings.rows} (steps x "
            "batch_rows); an iterator that can be read once has one pass, whatever max_passes says"
        )

    def _after_held_out(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        """Rows of a later pass without those that are held out."""
        skip = self._set_aside
        for part in parts:
            taken = min(skip, part.shape[-2])
            skip -= taken
            yield part[..., taken:, :]

    def _checked(self, parts: Iterator[Tensor], name: str = "activations") -> Iterator[Tensor]:
        shape: tuple[int, ...] | None = None
        for number, part in enumerate(parts):
            around = (*part.shape[:-2], part.shape[-1])
            if part.ndim != self.axes or not part.is_floating_point():
                wanted = "[n, d_in]" if self.axes == 2 else "[models, n, d_in]"
                raise CodecError(
                    f"{name}: tensor {number} has shape {tuple(part.shape)} and dtype "
                    f"{part.dtype}, expected real numbers {wanted}"
                )
            if shape is not None and around != shape:
                raise CodecError(
                    f"{name}: tensor {number} has shape {tuple(part.shape)}, others before it had "
                    f"{shape} beside their rows: they are of another site or model"
                )
            shape = around
            yield part


def _hash_rows(rows: Tensor) -> str:
    flat = rows.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:32]
