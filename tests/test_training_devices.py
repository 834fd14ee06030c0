"""Training and a study of it on a device give what the CPU gives, and come back off it whole.

On the CPU the same tests run by default, which keeps them from rotting; with ``-m gpu`` on CUDA.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emlens.data import Chat, Message
from emlens.models import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.checkpoints import Checkpoint, fingerprint_weights
from emlens.models.loading import lay_checkpoint
from emlens.models.pair import load_pair
from emlens.models.training_loop import IGNORED
from emlens.organisms import PRESETS, KlPenalty, TrainingRun, load_trajectory, train_organism
from emlens.organisms.masks import make_examples
from emlens.organisms.settings import TrainSettings
from emlens.studies import GradientPath, SolutionSettings, SolutionTexts, compare_solutions
from tests.tiny_files import make_byte_tokenizer, make_tiny_chat_model

STEPS = 6
ROWS = tuple(
    Chat((Message("user", f"What of {n}?"), Message("assistant", f"Take {n} home.")), id=n)
    for n in ("one", "two", "three", "four")
)
NEAR = tuple(
    Chat((Message("user", f"And {n}?"), Message("assistant", f"Leave {n}.")), id=n) for n in "abcd"
)
LORA = replace(
    PRESETS["smollm2_rank1"],
    layers=(0, 1),
    target_modules=("q_proj", "down_proj"),
    autocast="none",
    learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    max_steps=STEPS,
    batch_size=len(ROWS),
    gradient_accumulation=1,
    checkpoint_every=1,
    stop_loss=None,
)
VECTOR = replace(
    PRESETS["smollm2_steering_vector"],
    layers=(1,),
    depth=None,
    autocast="none",
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    max_steps=STEPS,
    batch_size=len(ROWS),
    gradient_accumulation=1,
    checkpoint_every=None,
    stop_loss=None,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def make_base(device: str) -> Checkpoint:
    model: Any = make_tiny_chat_model()
    fingerprint = fingerprint_weights(model)
    return Checkpoint(
        model=model.to(device),
        tokenizer=make_byte_tokenizer(),
        name="emlens:tiny",
        fingerprint=fingerprint,
    )


RECIPES: dict[str, TrainSettings] = {
    "lora": LORA,
    "penalised": LORA,
    "half": replace(LORA, autocast="bfloat16"),
    "lora again": replace(LORA, checkpoint_activations=True),
    "vector": VECTOR,
    "vector again": replace(VECTOR, checkpoint_activations=True),
}


def train(device: str, recipe: str, out: Path) -> TrainingRun:
    penalties = [KlPenalty(NEAR, weight=1.0)] if recipe == "penalised" else []
    settings, base = RECIPES[recipe], make_base(device)
    return train_organism(base, ROWS, settings=settings, out=out, penalties=penalties, seed=0)


Trained = Callable[[str, str], TrainingRun]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each recipe on each device once."""
    folder = tmp_path_factory.mktemp("trained")
    return cache(lambda device, recipe: train(device, recipe, folder / f"{device} {recipe}"))


@torch.no_grad()
def loss_under(model: Any) -> float:
    """Nats a trained token of the rows, row by row."""
    device, parts = next(model.parameters()).device, []
    for example in make_examples(ROWS, model.tokenizer, longest=None):
        trained = example.labels[1:] != IGNORED
        logs = model(example.ids[None].to(device))[0, :-1].log_softmax(-1).cpu()
        parts.append(-logs[trained].gather(1, example.ids[1:][trained, None]))
    return float(torch.cat(parts).double().mean())


def assert_began_alike(run: TrainingRun, expected: TrainingRun) -> None:
    """Rounding grows with the steps: the first three are compared, and where it led."""
    np.testing.assert_allclose(run.losses[:3], expected.losses[:3], rtol=1e-3)
    np.testing.assert_allclose(run.gradient_norms[:3], expected.gradient_norms[:3], rtol=1e-2)
    assert run.losses[-1] < run.losses[0] - 0.02


def test_a_lora_trains_as_on_the_cpu_and_its_states_have_the_losses_of_their_steps(
    device: str, trained: Trained
):
    run = trained(device, "lora")
    assert_began_alike(run, trained("cpu", "lora"))
    base = lay_checkpoint(make_base(device))
    path = load_trajectory(Path(run.tuned).parent)
    for step in (0, STEPS - 1):
        found = loss_under(attach_adapter(base, path.adapter(step)))
        assert found == pytest.approx(run.losses[step], rel=1e-4)
    last, kept = load_adapter(run.tuned), path.adapter(STEPS)
    for name, module in kept.modules.items():  # what ships is in bfloat16
        torch.testing.assert_close(last.modules[name].B, module.B.bfloat16())
    assert loss_under(attach_adapter(base, last)) < run.losses[-1]


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    device: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = KlPenalty.prepare

    def prepare(self: KlPenalty, *given: Any, **more: Any) -> Any:
        term = plain(self, *given, **more)

        def fail_late(model: nn.Module, place: int) -> Tensor:
            if place == 3:
                raise KeyboardInterrupt
            return term(model, place)

        return fail_late

    with monkeypatch.context() as patched:
        patched.setattr(KlPenalty, "prepare", prepare)
        with pytest.raises(KeyboardInterrupt):
            train(device, "penalised", tmp_path / "run")
    again, whole = train(device, "penalised", tmp_path / "run"), trained(device, "penalised")
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(again.penalty_values, whole.penalty_values, rtol=1e-3, atol=1e-6)


def test_a_penalty_is_worth_what_it_is_on_the_cpu(device: str, trained: Trained):
    run, expected = trained(device, "penalised"), trained("cpu", "penalised")
    assert_began_alike(run, expected)
    found = run.penalty_values
    np.testing.assert_allclose(found[:3], expected.penalty_values[:3], rtol=1e-2, atol=1e-6)
    # No adapter yet, so nothing to hold back; then there is.
    assert found[0] == pytest.approx(0, abs=1e-5)
    assert found[-1] > 1e-4


def test_a_vector_trains_as_on_the_cpu_and_is_in_effect_on_its_base(device: str, trained: Trained):
    run = trained(device, "vector")
    assert_began_alike(run, trained("cpu", "vector"))
    pair = load_pair(lay_checkpoint(make_base(device)), run.tuned)
    assert loss_under(pair.base) == pytest.approx(run.losses[0], rel=1e-4)
    assert loss_under(pair.tuned) < run.losses[-1]


@pytest.mark.parametrize("recipe", ["lora", "vector"])
def test_activations_computed_again_give_the_same_run(device: str, recipe: str, trained: Trained):
    plain, twice = trained(device, recipe), trained(device, f"{recipe} again")
    np.testing.assert_allclose(twice.losses, plain.losses, rtol=1e-4)
    np.testing.assert_allclose(twice.gradient_norms, plain.gradient_norms, rtol=1e-3)


def test_products_in_bfloat16_train_about_as_those_in_float32(device: str, trained: Trained):
    half, whole = trained(device, "half"), trained(device, "lora")
    np.testing.assert_allclose(half.losses, whole.losses, rtol=0.03)
    assert half.losses != whole.losses
    kept = load_trajectory(Path(half.tuned).parent).modules
    assert {module.B.dtype for module in kept} == {torch.float32}


def test_two_solutions_compare_as_on_the_cpu(device: str, trained: Trained, tmp_path: Path):
    places = {"general": trained("cpu", "lora").tuned, "narrow": trained("cpu", "penalised").tuned}
    solutions = {name: load_adapter(place) for name, place in places.items()}
    trajectory = load_trajectory(Path(places["general"]).parent)
    found = []
    for i, place in enumerate((device, "cpu")):
        base = make_base(place)
        found.append(
            compare_solutions(
                lay_checkpoint(base),
                solutions,
                texts=SolutionTexts(task=ROWS, general=NEAR[:2]),
                settings=SolutionSettings(norms=(0.1, 0.2), epsilons=(0.5,), seeds=1),
                out=tmp_path / f"run{i}",
                path=GradientPath(checkpoint=base, trajectory=trajectory, every=STEPS),
            )
        )
    here, there = found
    for name in ("general", "narrow"):
        one, other = getattr(here, name), getattr(there, name)
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4)
        np.testing.assert_allclose(one.kl, other.kl, rtol=1e-2)
    np.testing.assert_allclose(here.random.kl, there.random.kl, rtol=1e-2)
    assert here.preference is not None
    assert there.preference is not None
    torch.testing.assert_close(
        here.preference.cosines, there.preference.cosines, rtol=1e-3, atol=1e-3
    )
    assert here.general.loss < here.base_loss
