"""Sums of codes over tokens, prompt by prompt, that add up over batches and shards.

Tensors in, no model. What is kept grows with prompts, not with tokens: 16 bytes a prompt and latent
that fired there, and 8 d_in + 24 bytes a prompt; a dense [n_prompts d_sae] is never made. At 1,000
prompts on which 1,500 latents fire each that is 24 MB a model, where the matrix would be 1 GB with
131,072 latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from emlens.features.encode import EncodedRows
from emlens.numerics.sparse_sums import SparseSums
from emlens.numerics.validation import (
    EmptyAccumulatorError,
    WidthError,
    check_finite,
    check_same,
    check_samples,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSums:
    """What one model's activations and codes sum to on each prompt, over its tokens."""

    d_sae: int
    """Latents of the codec."""
    n_tokens: Int64[Tensor, " prompt"]
    """Tokens counted."""
    prompts: Int64[Tensor, " fired"]
    """Prompt of each (prompt, latent) pair with an active code, rising."""
    latents: Int64[Tensor, " fired"]
    """Its latent, rising within a prompt."""
    codes: Float64[Tensor, " fired"]
    """Its codes, summed."""
    firings: Int64[Tensor, " d_sae"]
    """Tokens at which each latent is active."""
    activations: Float64[Tensor, "prompt d_in"]
    """Activations, summed."""
    squares: Float64[Tensor, " prompt"]
    """Their squared norms, summed."""
    missed: Float64[Tensor, " prompt"]
    """Squared norms of activation less reconstruction, summed."""

    @property
    def n_prompts(self) -> int:
        """Number of prompts."""
        return len(self.n_tokens)

    @property
    def frequency(self) -> Float64[Tensor, " d_sae"]:
        """Share of tokens at which each latent is active."""
        return self.firings.double() / self.n_tokens.sum()

    @property
    def mean_codes(self) -> Float64[Tensor, " fired"]:
        """Mean code of each (prompt, latent) pair over the prompt's tokens."""
        return self.codes / self.n_tokens[self.prompts]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChangeSums:
    """How far two models' activations lie apart on the same tokens, prompt by prompt."""

    squares: Float64[Tensor, " prompt"]
    """Squared norms of tuned - base, summed."""
    missed: Float64[Tensor, " prompt"]
    """Squared norms of that less the difference of the reconstructions, summed."""


class PromptAccumulator:
    """One model's sums.

    Args:
        n_prompts: prompts of the whole run, also where a shard sees only some.
        d_in: width of an activation.
        d_sae: latents of the codec.
        keep_codes: whether codes are summed by prompt and latent; without them `codes` of the
            result is empty and what is kept does not grow with what fires.
    """

    def __init__(self, n_prompts: int, *, d_in: int, d_sae: int, keep_codes: bool = True) -> None:
        if min(n_prompts, d_in, d_sae) < 1:
            raise ValueError(
                f"n_prompts is {n_prompts}, d_in {d_in} and d_sae {d_sae}, expected at least 1 each"
            )
        self.sizes = (n_prompts, d_in, d_sae)
        self._keep_codes = keep_codes
        self._codes = SparseSums()
        self._n_tokens = torch.zeros(n_prompts, dtype=torch.long)
        self._firings = torch.zeros(d_sae, dtype=torch.long)
        self._activations = torch.zeros(n_prompts, d_in, dtype=torch.float64)
        self._squares = torch.zeros(n_prompts, dtype=torch.float64)
        self._missed = torch.zeros(n_prompts, dtype=torch.float64)

    def update(
        self, prompts: Int[Tensor, " n"], x: Float[Tensor, "n d_in"], encoded: EncodedRows
    ) -> None:
        """Take in some tokens.

        Args:
            prompts: prompt of each row, on the CPU.
            x: activations.
            encoded: what `encode_rows` made of them.

        Raises:
            WidthError: rows, prompts and codes that do not belong together, or of other widths.
            ValueError: a prompt that is none of the run.
            NonFiniteError: NaN or infinity. What was summed before stays as it was.
        """
        self._absorb(self._reduce(prompts, x, encoded), prompts, encoded)

    def _reduce(self, prompts: Tensor, x: Tensor, encoded: EncodedRows) -> "_Rows":
        """Check the arguments and what follows from them; nothing is added yet."""
        n_prompts, d_in, d_sae = self.sizes
        check_samples("x", x, d_in)
        check_samples("reconstruction", encoded.reconstruction, d_in)
        check_same("d_sae of the codes", encoded.d_sae, "d_sae of this accumulator", d_sae)
        check_same("number of prompts' entries", len(prompts), "number of rows of x", len(x))
        check_same("rows encoded", encoded.n_rows, "number of rows of x", len(x))
        if bool(((prompts < 0) | (prompts >= n_prompts)).any()):
            raise ValueError(
                f"prompts: got {int(prompts.min())} to {int(prompts.max())}, expected 0 to "
                f"{n_prompts - 1}"
            )
        wide = x.detach().double()
        gone = wide - encoded.reconstruction.detach().double()
        squares, missed = wide.square().sum(1).cpu(), gone.square().sum(1).cpu()
        # One number a row tells whether any of the row's is not finite.
        check_finite("x or its codes", squares, missed, encoded.values)
        return _Rows(wide=wide, gone=gone, squares=squares, missed=missed)

    def _absorb(self, rows: "_Rows", prompts: Tensor, encoded: EncodedRows) -> None:
        n_prompts, _, d_sae = self.sizes
        own, latents = prompts.long(), encoded.latents.cpu()
        if self._keep_codes:
            self._codes.update(own[encoded.rows.cpu()] * d_sae + latents, encoded.values.cpu())
        self._firings += torch.bincount(latents, minlength=d_sae)
        self._n_tokens += torch.bincount(own, minlength=n_prompts)
        seen, sums = sum_by_prompt(own, rows.wide) if lies_apart(rows.wide) else (own, rows.wide)
        self._activations.index_add_(0, seen, sums.cpu())
        self._squares.index_add_(0, own, rows.squares)
        self._missed.index_add_(0, own, rows.missed)

    def merge(self, other: "PromptAccumulator") -> None:
        """Take in what another of the same run has seen; it stays as it was.

        Raises:
            WidthError: it counts other prompts, another width or codec, or codes where this one
                does not.
        """
        if other.sizes != self.sizes:
            raise WidthError(
                f"other has (prompts, d_in, d_sae) {other.sizes}, this one {self.sizes}: shards "
                "count into the prompts of the whole run"
            )
        if other._keep_codes != self._keep_codes:
            raise WidthError(
                f"other has keep_codes={other._keep_codes}, this one {self._keep_codes}: codes of "
                "some shards would be missing"
            )
        self._codes.merge(other._codes)
        for name in ("_n_tokens", "_firings", "_activations", "_squares", "_missed"):
            getattr(self, name).add_(getattr(other, name))

    def result(self) -> PromptSums:
        """The sums of everything seen.

        Raises:
            EmptyAccumulatorError: a prompt of which no token was seen.
        """
        if bool((self._n_tokens == 0).any()):
            missing = (self._n_tokens == 0).nonzero()[:, 0].tolist()
            raise EmptyAccumulatorError(
                f"{len(missing)} of {self.sizes[0]} prompts have no token, the first is number "
                f"{missing[0]}: merge all shards, or leave the prompts out"
            )
        keys, sums = self._codes.result()
        return PromptSums(
            d_sae=self.sizes[2],
            n_tokens=self._n_tokens.clone(),
            prompts=keys // self.sizes[2],
            latents=keys % self.sizes[2],
            codes=sums,
            firings=self._firings.clone(),
            activations=self._activations.clone(),
            squares=self._squares.clone(),
            missed=self._missed.clone(),
        )


def lies_apart(x: Tensor) -> bool:
    """Whether rows are to be added up before they are moved to what is kept, on the CPU."""
    return x.device.type != "cpu"


def sum_by_prompt(
    prompts: Int[Tensor, " n"], rows: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, " prompt"], Float[Tensor, "prompt d"]]:
    """Return the prompts that occur, rising, and the sum of each one's rows, where the rows are.

    Args:
        prompts: prompt of each row, on the CPU.
        rows: on any device.
    """
    seen, places = prompts.unique(return_inverse=True)
    sums = rows.new_zeros(len(seen), rows.shape[1])
    return seen, sums.index_add_(0, places.to(rows.device), rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """What is added of some rows, in float64."""

    wide: Tensor  # [n d_in] activations
    gone: Tensor  # [n d_in] activations less reconstructions
    squares: Tensor  # [n] squared norms of the first, on the CPU
    missed: Tensor  # [n] squared norms of the second, on the CPU


class FeatureAccumulator:
    """The sums of one model, or of base and tuned on the same tokens and of their difference.

    Args:
        n_models: 1, or 2 for base and tuned.
        n_prompts: prompts of the whole run.
        d_in: width of an activation.
        d_sae: latents of the codec.
        keep_codes: as of `PromptAccumulator`.
    """

    def __init__(
        self, n_models: int, *, n_prompts: int, d_in: int, d_sae: int, keep_codes: bool = True
    ) -> None:
        if n_models not in (1, 2):
            raise ValueError(f"n_models is {n_models}, expected 1, or 2 for base and tuned")
        self.models = [
            PromptAccumulator(n_prompts, d_in=d_in, d_sae=d_sae, keep_codes=keep_codes)
            for _ in range(n_models)
        ]
        self._change = torch.zeros(2, n_prompts, dtype=torch.float64)

    def update(
        self,
        prompts: Int[Tensor, " n"],
        x: Float[Tensor, "models n d_in"],
        encoded: Sequence[EncodedRows],
    ) -> None:
        """Take in some tokens of all models; arguments and errors as `PromptAccumulator.update`."""
        check_same("models of x", len(x), "models of this accumulator", len(self.models))
        check_same("models encoded", len(encoded), "models of this accumulator", len(self.models))
        parts = list(zip(self.models, x, encoded, strict=True))
        rows = [own._reduce(prompts, values, codes) for own, values, codes in parts]
        for (own, _, codes), reduced in zip(parts, rows, strict=True):
            own._absorb(reduced, prompts, codes)
        if len(rows) == 2:
            change = rows[1].wide - rows[0].wide
            left = rows[1].gone - rows[0].gone  # change less the change of the reconstructions
            sums = torch.stack([change.square_().sum(1), left.square_().sum(1)]).cpu()
            self._change.index_add_(1, prompts.long(), sums)

    def merge(self, other: "FeatureAccumulator") -> None:
        """Take in what another of the same run has seen; it stays as it was.

        Raises:
            WidthError: it counts other models, prompts, widths or codecs.
        """
        check_same("models of other", len(other.models), "of this one", len(self.models))
        for own, theirs in zip(self.models, other.models, strict=True):
            own.merge(theirs)
        self._change += other._change

    def change(self) -> ChangeSums | None:
        """How far apart base and tuned are; None for one model."""
        if len(self.models) == 1:
            return None
        return ChangeSums(squares=self._change[0].clone(), missed=self._change[1].clone())
