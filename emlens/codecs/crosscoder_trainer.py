"""A BatchTopK crosscoder on its way, one batch at a time; not the loop around it.

Codes are of all models' activations at one token together, f = relu(sum_m x_m W_enc_m + b_enc), and
every model has its own decoder: x_m is about f W_dec_m + b_dec_m. In a batch of n rows the n k
largest f_j sum_m ||W_dec_mj|| are kept, so that a latent cannot gain by a small decoder.

Source: Minder et al. 2025, arXiv 2504.02922 (BatchTopK crosscoder, codes scaled by the decoder
norms of all models); revival of dead latents as Gao et al. 2024, arXiv 2406.04093, section A.2.
Differs: all models' rows are divided by one number, not each model's by its own, so that decoder
norms of two models can be compared.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emlens.codecs.checkpoint import optimizer_state, restore_optimizer
from emlens.codecs.loop import StepRecord
from emlens.codecs.settings import CrosscoderSettings

MAX_GRADIENT_NORM = 1.0
"""A longer gradient is shortened to this, as sae_lens does; the loss is a share of variance."""


class CrosscoderTrainer:
    """A crosscoder and its optimiser, over batches that are handed to it.

    Decoders of all models start as one, of unit norm, the encoder as their transpose, and the
    decoder biases at the means of the first batch.

    Args:
        settings: the recipe.
        first: the first batch, which gives the sizes, the device and the scale of the rows.
        seed: of the weights' start.
    """

    def __init__(
        self, settings: CrosscoderSettings, first: Float[Tensor, "models n d_in"], *, seed: int
    ) -> None:
        rows, device = first.float(), first.device
        models, _, d_in = rows.shape
        self.settings = settings
        self.scale = 1.0
        if settings.normalisation != "none":
            self.scale = d_in**0.5 / float(rows.norm(dim=2).mean())
        start = torch.randn(settings.d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        decoder = torch.nn.functional.normalize(start, dim=1).to(device).expand(models, -1, -1)
        self.weights_now = {
            "W_enc": (decoder.transpose(1, 2) / models).contiguous(),
            "b_enc": torch.zeros(settings.d_sae, device=device),
            "W_dec": decoder.clone(),
            "b_dec": rows.mean(1) * self.scale,
        }
        for weight in self.weights_now.values():
            weight.requires_grad_(True)
        self.adam = torch.optim.Adam(self.weights_now.values(), lr=settings.learning_rate)
        self.steps = 0
        # Steps since each latent was last active.
        self.idle = torch.zeros(settings.d_sae, dtype=torch.int64, device=device)

    def step(self, batch: Float[Tensor, "models n d_in"], *, recording: bool) -> StepRecord | float:
        """Do one step; gives its loss, or where it is to be recorded all of it."""
        self._set_step_size()
        x = batch.float() * self.scale
        cast = torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.settings.autocast == "bfloat16"
        )
        with cast:
            codes, raw = self._encode(x)
            reconstruction = self._decode(codes)
        total = (x - x.mean(1, keepdim=True)).square().sum()
        error = x - reconstruction.float()
        unexplained = error.square().sum() / total
        dead = self.idle > self.settings.dead_after_steps
        with cast:
            loss = unexplained + self._revive(error.detach(), raw, dead)
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights_now.values(), MAX_GRADIENT_NORM)
        self.adam.step()
        active = codes.detach() > 0
        self.idle = torch.where(active.any(0), 0, self.idle + 1)
        self.steps += 1
        if not recording:
            return float(loss.detach())
        return StepRecord(
            loss=float(loss.detach()),
            explained_variance=1 - float(unexplained.detach()),
            l0=float(active.sum()) / x.shape[1],
            dead_share=float(dead.float().mean()),
        )

    def parameters(self) -> Iterable[Tensor]:
        """What is trained."""
        return self.weights_now.values()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "weights": {name: weight.detach() for name, weight in self.weights_now.items()},
            "adam": optimizer_state(self.adam),
            "scale": self.scale,
            "steps": self.steps,
            "idle": self.idle,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when that state was taken."""
        with torch.no_grad():
            for name, weight in self.weights_now.items():
                weight.copy_(state["weights"][name])
        restore_optimizer(self.adam, state["adam"])
        self.scale, self.steps = state["scale"], state["steps"]
        self.idle = state["idle"].to(self.idle.device)

    @torch.no_grad()
    def weights(self) -> dict[str, Any]:
        """The weights for use on activations as they are: scale and code normalisation folded in.

        Codes are then in units of what their latent adds: the norms of its decoder vectors, summed
        over the models, are 1.
        """
        now = {name: weight.detach() for name, weight in self.weights_now.items()}
        # Of the decoders as they act on the activations as they are.
        norms = self._norms(now["W_dec"]) / self.scale
        return {
            "W_enc": now["W_enc"] * self.scale * norms,
            "b_enc": now["b_enc"] * norms,
            "W_dec": now["W_dec"] / self.scale / norms[:, None],
            "b_dec": now["b_dec"] / self.scale,
        }

    def _set_step_size(self) -> None:
        s, step = self.settings, self.steps
        rise = (step + 1) / s.warmup_steps if step < s.warmup_steps else 1.0
        fall = (s.steps - step) / s.decay_steps if s.decay_steps else 1.0
        for group in self.adam.param_groups:
            group["lr"] = s.learning_rate * min(1.0, rise, fall)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of which the k largest a row are left, and what they were before."""
        weights = self.weights_now
        raw = torch.einsum("mnd,mds->ns", x, weights["W_enc"]) + weights["b_enc"]
        codes = raw.relu()
        scores = (codes * self._norms(weights["W_dec"])).detach().flatten()
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(self.settings.k * x.shape[1], sorted=False).indices] = True
        return torch.where(kept.view_as(codes), codes, 0), raw

    def _decode(self, codes: Tensor) -> Tensor:
        weights = self.weights_now
        return torch.einsum("ns,msd->mnd", codes, weights["W_dec"]) + weights["b_dec"][:, None]

    def _revive(self, error: Tensor, raw: Tensor, dead: Bool[Tensor, " d_sae"]) -> Tensor:
        """The loss by which dead latents learn what the others leave unsaid.

        Source: Gao et al. 2024, section A.2: of the dead latents the d_in / 2 largest reconstruct
        the error.
        """
        if self.settings.aux_coefficient == 0 or not bool(dead.any()):
            return error.new_zeros(())
        wanted = min(int(dead.sum()), max(1, error.shape[2] // 2))
        chosen = torch.where(dead, raw, -torch.inf).topk(wanted, dim=1, sorted=False)
        codes = torch.zeros_like(raw).scatter(1, chosen.indices, chosen.values)
        said = torch.einsum("ns,msd->mnd", codes, self.weights_now["W_dec"]).float()
        total = (error - error.mean(1, keepdim=True)).square().sum()
        share = (error - said).square().sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
        # With few dead latents little can be reconstructed.
        return self.settings.aux_coefficient * wanted / max(1, error.shape[2] // 2) * share

    @staticmethod
    def _norms(decoder: Tensor) -> Tensor:
        """Norms of each latent's decoder vectors, summed over the models."""
        return decoder.norm(dim=2).sum(0).clamp_min(torch.finfo(decoder.dtype).tiny)
