"""What `emlens train --dry-run` says to a person: the recipe in words, without what is not set."""

from collections.abc import Sequence
from typing import Any


def describe_training(flags: Any, settings: Any, length: Any, sizes: Any) -> dict[str, str]:
    """What a run would be, by names, each in a few words; what was not asked for is left out.

    Args:
        flags: of `train`.
        settings: the recipe with what flags changed of it.
        length: a `TrainingPlan`.
        sizes: of the base, as `read_sizes` gives them.
    """
    rows_a_step = settings.batch_size * settings.gradient_accumulation
    passes = length.steps * rows_a_step / length.rows
    found = {
        "base": f"{flags.base}: {sizes.n_parameters:,} parameters, {sizes.n_layers} blocks",
        "recipe": flags.preset,
        "rows": (
            f"{length.rows:,} of {flags.data}, at most {min(settings.max_length, sizes.n_ctx):,} "
            "tokens each"
        ),
        "tokens": (
            f"{length.tokens:,} in one pass over the rows, {length.trained_tokens:,} of them "
            "learnt (the responses)"
        ),
        "steps": f"{length.steps:,} of {_say_batch(settings)}: {passes:.3g} passes over the rows",
        "ends early": _say_stop(settings),
        "learning rate": _say_rate(settings, length.steps),
        "trains": _say_method(flags, settings, sizes),
        "starts from": flags.start_from or "",
        "penalty": " and ".join(_list_penalties(flags, length)),
        "checkpoints": _say_checkpoints(settings, length),
        "seed": str(flags.seed),
        "dtype": f"{flags.dtype}{_say_precision(settings)}",
        "device": flags.device,
    }
    return {name: said for name, said in found.items() if said}


def _say_batch(settings: Any) -> str:
    size, parts = settings.batch_size, settings.gradient_accumulation
    return f"{size * parts} rows" + (f" ({parts} batches of {size})" if parts > 1 else "")


def _say_stop(settings: Any) -> str:
    if settings.stop_loss is None:
        return ""
    return f"once the mean loss of five steps is below {settings.stop_loss:g} nats a token"


def _say_rate(settings: Any, steps: int) -> str:
    falls = {"constant": "constant", "linear": "falling in a line to 0"}
    how = falls.get(settings.schedule, f"falling to 0 as a {settings.schedule}")
    warm = min(settings.warmup_steps, steps)
    return f"{settings.learning_rate:g}, {how}" + (
        f" after {warm} steps of warm-up" if warm else ""
    )


def _say_method(flags: Any, settings: Any, sizes: Any) -> str:
    if settings.method == "full":
        return "every parameter"
    where = f"{', '.join(settings.target_modules)} of {_say_layers(settings, sizes)}"
    if settings.method == "vector":
        return f"one vector, added {settings.alpha:g} times to the output of {where}"
    if flags.start_from is not None:
        return "the LoRA that it starts from, by its own rank, alpha and modules"
    rank, alpha = settings.rank, settings.alpha
    over, below = ("sqrt(rank)", rank**0.5) if settings.use_rslora else ("rank", rank)
    scale = f"scale alpha / {over} = {alpha / below:.4g}"
    return f"a LoRA of rank {rank} and alpha {alpha:g} ({scale}) on {where}"


def _say_layers(settings: Any, sizes: Any) -> str:
    if settings.layers == "all":
        return f"all {sizes.n_layers} blocks"
    one = len(settings.layers) == 1
    return f"{'block' if one else 'blocks'} {', '.join(map(str, settings.layers))}"


def _list_penalties(flags: Any, length: Any) -> Sequence[str]:
    found = []
    if flags.kl_data:
        found.append(
            f"{flags.kl_weight:g} x KL from the base on {length.kl_rows:,} rows of "
            f"{', '.join(flags.kl_data)} ({length.kl_tokens:,} tokens)"
        )
    if flags.latent_sae is not None:
        found.append(
            f"{flags.latent_weight:g} x rise of the latents {flags.latents} of {flags.latent_sae} "
            f"on {length.latent_rows:,} rows ({length.latent_tokens:,} tokens)"
        )
    return found


def _say_checkpoints(settings: Any, length: Any) -> str:
    if not length.checkpoints:
        return "none: a run that is interrupted begins anew"
    return f"{length.checkpoints:,}, one every {settings.checkpoint_every} steps"


def _say_precision(settings: Any) -> str:
    return "" if settings.autocast == "none" else f", products in {settings.autocast}"
