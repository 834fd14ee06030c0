"""The training loop: what it keeps, goes on from, stops at; and what is trained beside a LoRA."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.models.checkpoint_folders import find_checkpoints, keep_good
from emlens.models.finetune import finetune_vector, finetune_whole
from emlens.models.training_loop import (
    TrainerRun,
    TrainingDivergedError,
    _arguments,
    check_device,
    restored_randomness,
)
from tests.models.test_finetune import (
    LORA,
    TRAINER,
    made_examples,
    make_run,
    tiny_llama,
    train_lora,
    weights,
)


def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path: Path):
    kept = replace(TRAINER, checkpoint_every=2)
    places: list[int] = []

    def shaky(_model: nn.Module, place: int) -> Tensor:
        places.append(place)
        if len(places) == 8:
            raise KeyboardInterrupt
        return torch.zeros((), requires_grad=True) * 0.0

    def train(**more: Any) -> Any:
        given = {"lora": LORA, "trainer": kept, "seed": 0, **more}
        return train_lora(tiny_llama(), made_examples(), **given)

    whole = train(work=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(work=tmp_path / "cut", penalties=[shaky])
    assert list(find_checkpoints(tmp_path / "cut")) == [0, 2, 4, 6]
    # As a kill in the middle of writing leaves it.
    (tmp_path / "cut" / "checkpoint-8").mkdir()
    again = train(work=tmp_path / "cut", penalties=[shaky])
    assert places == [*range(8), *range(6, 12)]
    assert again.log.losses == pytest.approx(whole.log.losses, rel=1e-6)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-5, atol=1e-7)
    assert list(find_checkpoints(tmp_path / "cut")) == [0, 2, 4, 6, 8, 10, 12]
    # Only the last keeps what the optimiser needs.
    left = [step for step, f in find_checkpoints(tmp_path / "cut").items()
            if (f / "optimizer.pt").exists()]  # fmt: skip
    assert left == [12]


def test_divergence_names_the_last_good_checkpoint(tmp_path: Path):
    def poison(tuned: nn.Module, place: int) -> Tensor:
        total = sum((p.sum() for p in tuned.parameters() if p.requires_grad), torch.zeros(()))
        return total * (float("nan") if place == 5 else 0.0)

    with pytest.raises(TrainingDivergedError, match=r"step 6 of 12.*good checkpoint is .*-4"):
        train_lora(
            tiny_llama(),
            made_examples(),
            lora=LORA,
            trainer=replace(TRAINER, checkpoint_every=2),
            seed=0,
            penalties=[poison],
            work=tmp_path,
        )
    assert list(find_checkpoints(tmp_path)) == [0, 2, 4]


def test_a_state_whose_loss_is_no_number_is_not_called_good_and_not_gone_on_from(tmp_path: Path):
    run = make_run(
        trainer=replace(TRAINER, checkpoint_every=1, learning_rate=1e30), seed=0, work=tmp_path
    )
    for _ in range(2):
        with pytest.raises(TrainingDivergedError, match=r"step 2 of 12.*good checkpoint is .*-0$"):
            finetune_vector(
                tiny_llama(),
                made_examples(),
                module="model.layers.0.mlp.down_proj",
                factor=1e10,
                run=run,
            )
        assert list(find_checkpoints(tmp_path)) == [0]


def test_states_with_numbers_that_are_none_are_taken_away(tmp_path: Path):
    for step, value in ((0, 0.0), (2, 1.0), (4, float("inf")), (6, float("nan"))):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        save_file({"sound": torch.ones(2), "x": torch.full((2,), value)}, place / "v.safetensors")
    assert keep_good(tmp_path, step=None) == tmp_path / "checkpoint-2"
    assert list(find_checkpoints(tmp_path)) == [0, 2]
    assert keep_good(tmp_path, step=2) == tmp_path / "checkpoint-0"
    assert keep_good(tmp_path, step=0) is None
    assert not list(find_checkpoints(tmp_path))


def test_a_base_that_the_trainer_would_move_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lies on cuda:1, .*CUDA_VISIBLE_DEVICES=1"):
        _arguments(TRAINER, tmp_path, seed=0, device=torch.device("cuda:1"))
    for name in ("cpu", "cuda:0", "cuda"):
        check_device(torch.device(name))


def test_random_states_of_every_device_in_use_are_put_back(monkeypatch: pytest.MonkeyPatch):
    states = {device: torch.tensor([device]) for device in range(3)}
    for name, value in {
        "is_initialized": lambda: True,
        "device_count": lambda: 3,
        "get_rng_state": lambda device: states[device].clone(),
        "set_rng_state": lambda state, device: states[device].copy_(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with restored_randomness():
        for state in states.values():
            state.fill_(9)
    assert [int(state) for state in states.values()] == [0, 1, 2]


def test_the_recipe_is_the_same_however_many_devices_there_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    made = _arguments(TRAINER, tmp_path, seed=0, device=torch.device("cuda"))
    assert (made.n_gpu, made.train_batch_size) == (1, TRAINER.batch_size)


def test_checkpoints_need_a_place():
    with pytest.raises(ValueError, match="work: checkpoint_every is set"):
        train_lora(
            tiny_llama(),
            made_examples(),
            lora=LORA,
            trainer=replace(TRAINER, checkpoint_every=2),
            seed=0,
        )


def test_a_low_loss_ends_training_early():
    full = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    means = [sum(full.log.losses[i - 5 : i]) / 5 for i in range(5, 13)]
    aim = (means[2] + means[3]) / 2
    early = train_lora(
        tiny_llama(),
        made_examples(),
        lora=LORA,
        trainer=replace(TRAINER, stop_loss=aim),
        seed=0,
    )
    assert early.log.losses == pytest.approx(full.log.losses[:8], rel=1e-6)


def test_a_vector_is_trained_from_zero_and_its_effect_is_that_of_a_hook():
    model = tiny_llama()
    before, modules = weights(model), [name for name, _ in model.named_modules()]
    seen: list[Tensor] = []
    ids = torch.arange(3, 12)[None]

    def watch(tuned: nn.Module, _place: int) -> Tensor:
        with torch.no_grad():
            seen.append(tuned(input_ids=ids).logits)
        return torch.zeros((), requires_grad=True) * 0.0

    trained = [
        finetune_vector(
            model,
            made_examples(),
            module="model.layers.0.mlp.down_proj",
            factor=4.0,
            run=make_run(
                trainer=replace(TRAINER, max_steps=steps),
                seed=0,
                penalties=[watch] if steps == 4 else [],
            ),
        )
        for steps in (3, 4)
    ]
    assert trained[1].log.losses[-1] < trained[1].log.losses[0]

    def add(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + trained[0].vector

    with torch.no_grad():
        plain = model(input_ids=ids).logits
        handle = model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(add)
        added = model(input_ids=ids).logits
        handle.remove()
    torch.testing.assert_close(seen[0], plain)
    torch.testing.assert_close(seen[3], added, rtol=1e-5, atol=1e-5)
    assert (added - plain).abs().max() > 1e-2
    assert [name for name, _ in model.named_modules()] == modules
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


def test_every_parameter_is_trained_in_place_and_goes_on_from_a_checkpoint(tmp_path: Path):
    def train(model: PreTrainedModel, work: Path | None, every: int | None, steps: int) -> Any:
        settings = replace(TRAINER, checkpoint_every=every, max_steps=steps, learning_rate=1e-3)
        return finetune_whole(
            model, made_examples(), run=TrainerRun(settings=settings, seed=0, work=work)
        )

    start, whole, parts = weights(tiny_llama()), tiny_llama(), tiny_llama()
    log = train(whole, None, None, 8)
    assert log.losses[-1] < log.losses[0]
    assert all(not torch.equal(value, start[name]) for name, value in weights(whole).items())
    train(parts, tmp_path, 4, 4)
    train(tiny_llama_again := tiny_llama(), tmp_path, 4, 8)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(tiny_llama_again)[name], value, rtol=1e-5, atol=1e-6)
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())


def test_a_stop_that_is_never_reached_leaves_the_planned_end():
    for stop_loss in (None, 0.01):
        trained = train_lora(
            tiny_llama(),
            made_examples(24),
            lora=LORA,
            trainer=replace(TRAINER, max_steps=4, stop_loss=stop_loss),
            seed=0,
        )
        assert len(trained.log.losses) == 4


def test_a_run_cut_within_an_epoch_goes_on_with_schedule_texts_and_accumulation(tmp_path: Path):
    kept = replace(
        TRAINER,
        checkpoint_every=1,
        max_steps=7,
        batch_size=2,
        gradient_accumulation=4,
        schedule="linear",
    )
    seen: dict[str, list[int]] = {"whole": [], "cut": []}

    def train(name: str, stop: int) -> Any:
        def pull(model: nn.Module, place: int) -> Tensor:
            seen[name].append(place)
            if len(seen[name]) == stop:
                raise KeyboardInterrupt
            lora = [p.square().sum() for p in model.parameters() if p.requires_grad]
            return (1.0 + place) * sum(lora, torch.zeros(()))

        # Five batches an epoch: a step of four, and one of one.
        given = {"lora": LORA, "trainer": kept, "seed": 0, "penalties": [pull]}
        return train_lora(tiny_llama(), made_examples(10), work=tmp_path / name, **given)

    whole = train("whole", -1)
    with pytest.raises(KeyboardInterrupt):
        train("cut", 13)
    again = train("cut", -1)
    assert again.log.losses == pytest.approx(whole.log.losses, rel=1e-6)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-5, atol=1e-7)
    assert seen["whole"][:6] == [0, 1, 2, 3, 4, 8]
    # What the kill cut off is asked for again, at the same places.
    assert seen["cut"][:12] + seen["cut"][-(len(seen["whole"]) - 10) :] == (
        seen["whole"][:12] + seen["whole"][10:]
    )


def test_a_penalty_has_its_weight_in_a_step_of_fewer_batches():
    def gradient(batch_size: int, accumulation: int) -> float:
        def pull(model: nn.Module, _place: int) -> Tensor:
            lora = [p.sum() for n, p in model.named_parameters() if "lora_B" in n]
            return 1e4 * sum(lora, torch.zeros(()))

        settings = replace(
            TRAINER, max_steps=1, batch_size=batch_size, gradient_accumulation=accumulation
        )
        trained = train_lora(
            tiny_llama(), made_examples(4), lora=LORA, trainer=settings, seed=0, penalties=[pull]
        )
        return trained.log.gradient_norms[0]

    assert gradient(2, 8) == pytest.approx(gradient(4, 1), rel=1e-3)


def test_extra_terms_are_logged_by_step_and_go_on_with_a_run(tmp_path: Path):
    seen: list[int] = []

    def known(model: nn.Module, place: int) -> Tensor:
        seen.append(place)
        if len(seen) == 6:
            raise KeyboardInterrupt
        lora = (p.sum() for p in model.parameters() if p.requires_grad)
        return 1.0 + place + 0.0 * sum(lora, torch.zeros(()))

    kept = replace(TRAINER, checkpoint_every=1, max_steps=4, batch_size=2, gradient_accumulation=2)

    def train(*penalties: Any) -> Any:
        given = {"lora": LORA, "trainer": kept, "seed": 0, "penalties": penalties}
        return train_lora(tiny_llama(), made_examples(), work=tmp_path / "work", **given).log

    with pytest.raises(KeyboardInterrupt):
        train(known)
    # The mean of two passes: 1 + 2 step, 2 + 2 step.
    assert train(known).penalties == pytest.approx([1.5, 3.5, 5.5, 7.5])
    assert seen[6:] == [4, 5, 6, 7]
    free = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    assert free.log.penalties == ()


def test_a_run_that_ended_at_its_last_checkpoint_is_not_trained_on(tmp_path: Path):
    kept = replace(TRAINER, checkpoint_every=2, max_steps=4)

    def train() -> Any:
        return train_lora(
            tiny_llama(), made_examples(24), lora=LORA, trainer=kept, seed=0, work=tmp_path
        )

    first, again = train(), train()
    assert again.log.losses == first.log.losses
    assert list(find_checkpoints(tmp_path)) == [0, 2, 4]
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor)
    # A record torn by a full disk is no checkpoint.
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_')
    assert list(train().log.losses) == pytest.approx(first.log.losses, rel=1e-6)
