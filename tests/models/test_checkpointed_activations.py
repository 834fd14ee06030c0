"""Activations that are computed twice: plain training is the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from emlens.models.checkpointed_activations import checkpointed_activations
from emlens.models.finetune import finetune_vector, finetune_whole
from tests.models.test_finetune import (
    LORA,
    TRAINER,
    made_examples,
    make_run,
    tiny_llama,
    train_lora,
    weights,
)

MODULE = "model.layers.0.mlp.down_proj"
SHORT = replace(TRAINER, max_steps=3)


def fields(model: nn.Module) -> list[dict[str, Any]]:
    """Everything of each module but its tables, which are compared as weights."""
    tables = ("_parameters", "_buffers", "_modules")
    return [{k: v for k, v in vars(m).items() if k not in tables} for m in model.modules()]


def counted(model: Any, calls: list[int]) -> None:
    # Before, not after: a second run ends as soon as it has what the gradient needs.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("method", ["lora", "vector", "full"])
def test_losses_and_gradients_are_those_of_plain_training_and_blocks_run_twice(method: str):
    calls: dict[bool, list[int]] = {True: [], False: []}

    def train(wanted: bool) -> Any:
        model, run = tiny_llama(), replace(SHORT, checkpoint_activations=wanted)
        counted(model, calls[wanted])
        before = fields(model.model.layers)
        if method == "lora":
            log = train_lora(model, made_examples(), lora=LORA, trainer=run, seed=0).log
        elif method == "vector":
            log = finetune_vector(
                model,
                made_examples(),
                module=MODULE,
                factor=4.0,
                run=make_run(trainer=run, seed=0),
            ).log
        else:
            log = finetune_whole(model, made_examples(), run=make_run(trainer=run, seed=0))
        assert [set(own) for own in fields(model.model.layers)] == [set(own) for own in before]
        assert not model.model.layers[0].gradient_checkpointing
        return log

    plain, twice = train(False), train(True)
    assert twice.losses == pytest.approx(plain.losses, rel=1e-5)
    assert twice.gradient_norms == pytest.approx(plain.gradient_norms, rel=1e-4)
    assert min(plain.gradient_norms) > 0
    assert (len(calls[False]), len(calls[True])) == (3, 6)


def test_blocks_are_put_back_after_an_error_and_a_model_without_any_is_refused():
    model: Any = tiny_llama()
    before, values = fields(model), weights(model)
    seen: list[bool] = []

    def fail() -> None:
        with checkpointed_activations(model, wanted=True):
            seen.extend((model.model.layers[1].gradient_checkpointing, model.config.use_cache))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [True, False]
    assert fields(model) == before
    assert model.config.use_cache
    assert all(torch.equal(value, values[name]) for name, value in weights(model).items())
    with (
        pytest.raises(ValueError, match="checkpoint_activations: a Linear has no blocks"),
        checkpointed_activations(nn.Linear(2, 2), wanted=True),
    ):
        pass
