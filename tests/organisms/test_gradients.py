"""Gradients along a trajectory against finite differences of the loss."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from emlens.data.chat import Chat
from emlens.models.adapter_files import load_adapter, save_adapter
from emlens.models.checkpoints import Checkpoint
from emlens.models.finetune import find_gradients
from emlens.models.lora import LoraAdapter, LoraModule
from emlens.models.training_loop import collate_examples
from emlens.organisms import PRESETS, load_trajectory, train_organism
from emlens.organisms.gradients import measure_gradient_preference
from emlens.organisms.masks import make_examples

SETTINGS = replace(
    PRESETS["smollm2_rank1"],
    layers=(1,),
    target_modules=("down_proj", "q_proj"),
    max_steps=8,
    checkpoint_every=4,
    batch_size=4,
    learning_rate=1e-2,
)


def loss(base: Checkpoint, adapter: LoraAdapter, chats: list[Chat], folder: Path) -> float:
    batch = collate_examples(make_examples(chats, base.tokenizer, longest=None))
    tuned = PeftModel.from_pretrained(base.model, str(save_adapter(adapter, folder)))
    try:
        with torch.no_grad():
            return float(tuned(**batch).loss)
    finally:
        tuned.unload()


def test_gradients_are_the_slopes_of_the_loss_over_all_tokens(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    run = train_organism(tiny_base, chats, settings=SETTINGS, out=tmp_path / "run", seed=0)
    adapter = load_adapter(run.tuned)
    examples = make_examples(chats, tiny_base.tokenizer, longest=None)
    found = find_gradients(tiny_base.model, Path(run.tuned), examples)
    assert set(found) == set(adapter.modules)
    name = "model.layers.1.mlp.down_proj"
    module = adapter.modules[name]
    step = 0.02 * found[name] / found[name].norm()
    values = []
    for place, sign in enumerate((1.0, -1.0)):
        moved = LoraModule(A=module.A, B=module.B.float() + sign * step, scale=module.scale)
        changed = replace(adapter, modules={**adapter.modules, name: moved})
        values.append(loss(tiny_base, changed, chats, tmp_path / f"moved{place}"))
    slope = (values[0] - values[1]) / 0.04
    assert slope == pytest.approx(float(found[name].norm()), rel=0.02)


def test_the_gradient_prefers_the_solution_it_came_from(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    run = train_organism(tiny_base, chats, settings=SETTINGS, out=tmp_path / "run", seed=0)
    trajectory = load_trajectory(tmp_path / "run")
    own = load_adapter(run.tuned)
    away = replace(
        own, modules={n: replace(m, B=-m.B) for n, m in own.modules.items()}, name="away"
    )
    found = measure_gradient_preference(
        tiny_base, trajectory, {"own": own, "away": away}, chats=chats, every=1
    )
    assert found.steps.tolist() == [0, 4, 8]
    assert float(found.cosines[0, 0]) > 0.1
    torch.testing.assert_close(found.cosines[1], -found.cosines[0])
    assert bool((found.norms > 0).all())
    assert found.rows()[0]["own"] == float(found.cosines[0, 0])


def test_solutions_of_other_modules_are_refused(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    run = train_organism(tiny_base, chats, settings=SETTINGS, out=tmp_path / "run", seed=0)
    trajectory, own = load_trajectory(tmp_path / "run"), load_adapter(run.tuned)
    part = replace(own, modules=dict(list(own.modules.items())[:1]))
    with pytest.raises(ValueError, match="part does not adapt"):
        measure_gradient_preference(tiny_base, trajectory, {"part": part}, chats=chats, every=1)
    with pytest.raises(ValueError, match="got none"):
        measure_gradient_preference(tiny_base, trajectory, {}, chats=chats, every=1)
