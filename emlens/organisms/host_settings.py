"""A recipe in the terms of those who carry it out: the LoRA of peft, the loop of the Trainer."""

from emlens.models.finetune import LoraSettings
from emlens.models.training_loop import TrainerSettings
from emlens.organisms.settings import TrainSettings


def lora_settings(settings: TrainSettings) -> LoraSettings:
    """The LoRA of a recipe that has one."""
    assert settings.rank is not None
    assert settings.alpha is not None
    return LoraSettings(
        rank=settings.rank,
        alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=settings.target_modules,
        layers=None if settings.layers in ("all", None) else tuple(settings.layers),
    )


def trainer_settings(settings: TrainSettings) -> TrainerSettings:
    """How a recipe is trained, whatever of the model that is."""
    return TrainerSettings(
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        max_gradient_norm=settings.max_gradient_norm,
        autocast=settings.autocast,
        stop_loss=settings.stop_loss,
        checkpoint_every=settings.checkpoint_every,
        checkpoint_activations=settings.checkpoint_activations,
    )
