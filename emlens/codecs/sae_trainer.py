"""A sparse autoencoder on its way: sae_lens's trainer, one batch at a time; not the loop around it.

The autoencoder, its losses, the revival of dead latents and the schedule of step sizes are those of
sae_lens. Ours are the start, the state that a run goes on from, and what comes out.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emlens.codecs.checkpoint import optimizer_state, restore_optimizer
from emlens.codecs.loop import StepRecord
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.codecs.settings import SaeSettings

_CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
_COUNTERS = (
    *("n_training_samples", "n_training_steps", "n_frac_active_samples"),
    *("act_freq_scores", "n_forward_passes_since_fired"),
)
"""What the trainer counts, besides the state of its parts."""


class SaeTrainer:
    """sae_lens's trainer over batches that are handed to it.

    The decoder's bias starts at the mean of the first batch, so that no latent is spent on it.

    Args:
        settings: the recipe.
        first: the first batch, which gives the width, the device and the scale of the rows.
        seed: of the weights' start.
    """

    def __init__(self, settings: SaeSettings, first: Float[Tensor, "n d_in"], *, seed: int) -> None:
        sae_lens = import_sae_lens()
        rows = first.float()
        scale = 1.0
        if settings.normalisation != "none":
            scale = rows.shape[1] ** 0.5 / float(rows.norm(dim=1).mean())
        name = _CLASSES[settings.architecture]
        config = getattr(sae_lens, f"{name}Config")(**_describe(settings, rows.shape[1]))
        # Its start is drawn on the CPU, from the global stream. That one alone is seeded, and put
        # back: torch.manual_seed would seed every other device's, too, even one that is not in use
        # yet and has no state to put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            sae = getattr(sae_lens, name)(config)
        with torch.no_grad():
            sae.b_dec.copy_(rows.mean(0) * scale)
        sae.to(str(first.device))
        self.sae = sae
        trainer_config = sae_lens.config.SAETrainerConfig(
            total_training_samples=settings.rows,
            train_batch_size_samples=settings.batch_rows,
            lr=settings.learning_rate,
            # Where the fall to 0 begins.
            lr_end=settings.learning_rate,
            lr_warm_up_steps=settings.warmup_steps,
            lr_decay_steps=settings.decay_steps,
            device=str(first.device),
            autocast=settings.autocast == "bfloat16",
            dead_feature_window=settings.dead_after_steps,
        )
        self.trainer = sae_lens.SAETrainer(trainer_config, sae, iter(()))
        if settings.normalisation != "none":
            self.trainer.activation_scaler.scaling_factor = scale

    def step(self, batch: Float[Tensor, "n d_in"], *, recording: bool) -> StepRecord | float:
        """Do one step; gives its loss, or where it is to be recorded all of it."""
        out = self.trainer.step(batch.float())
        self.trainer.n_training_steps += 1
        loss = float(out.loss.detach())
        if not recording:
            return loss
        with torch.no_grad():
            x = out.sae_in
            error = (x - out.sae_out).square().sum(dtype=torch.float64)
            total = (x - x.mean(0)).square().sum(dtype=torch.float64)
            return StepRecord(
                loss=loss,
                explained_variance=1 - float(error / total),
                l0=float((out.feature_acts > 0).sum()) / len(x),
                dead_share=float(self.trainer.dead_neurons.float().mean()),
            )

    def parameters(self) -> Iterable[Tensor]:
        """What is trained."""
        return self.sae.parameters()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "sae": dict(self.sae.state_dict()),
            "adam": optimizer_state(self.trainer.optimizer),
            "schedule": self.trainer.lr_scheduler.state_dict(),
            "scale": self.trainer.activation_scaler.scaling_factor,
            **{name: getattr(self.trainer, name) for name in _COUNTERS},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when that state was taken."""
        self.sae.load_state_dict(state["sae"])
        restore_optimizer(self.trainer.optimizer, state["adam"])
        self.trainer.lr_scheduler.load_state_dict(dict(state["schedule"]))
        self.trainer.activation_scaler.scaling_factor = state["scale"]
        for name in _COUNTERS:
            value = state[name]
            on = value.to(self.sae.device) if isinstance(value, Tensor) else value
            setattr(self.trainer, name, on)

    @torch.no_grad()
    def weights(self) -> dict[str, Any]:
        """The weights as sae_lens saves them for use: scale and decoder norms folded in.

        `W_enc`, `b_enc`, `W_dec`, `b_dec`, and `threshold` where latents are chosen by one.
        """
        sae = copy.deepcopy(self.sae)
        if (scale := self.trainer.activation_scaler.scaling_factor) is not None:
            sae.fold_activation_norm_scaling_factor(scale)
        found = dict(sae.state_dict())
        sae.process_state_dict_for_saving_inference(found)
        return {name: weight.detach().clone() for name, weight in found.items()}


def _describe(settings: SaeSettings, d_in: int) -> dict[str, Any]:
    """The autoencoder's settings by sae_lens's names."""
    found: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": settings.d_sae,
        "k": settings.k,
        "aux_loss_coefficient": settings.aux_coefficient,
        "normalize_activations": settings.normalisation,
    }
    if settings.matryoshka_widths is not None:
        found["matryoshka_widths"] = list(settings.matryoshka_widths)
        found["use_matryoshka_aux_loss"] = True
    return found
