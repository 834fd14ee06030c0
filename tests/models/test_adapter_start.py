"""Adapters to go on training: put on whole, with peft's own files, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emlens.models.finetune import check_start
from tests.models.test_finetune import LORA, TRAINER, made_examples, tiny_llama, train_lora, weights

WEIGHTS = "adapter_model.safetensors"


def trained(folder: Path, *, n_layers: int) -> Path:
    """A folder as peft would write it, of a model of so many blocks."""
    folder.mkdir()
    model = tiny_llama(n_layers=n_layers)
    made = train_lora(model, made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    save_file(dict(made.tensors), folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(dict(made.config)))
    return folder


@pytest.mark.parametrize(
    ("of", "on", "said"),
    [
        (4, 2, r"model has no model\.layers\.2\.mlp\.down_proj, which it adapts \(4 such"),
        (2, 4, r"nothing for model\.layers\.2\.mlp\.down_proj of the model \(4 such"),
    ],
)
def test_an_adapter_of_another_depth_is_refused_and_taken_off(
    of: int, on: int, said: str, tmp_path: Path
):
    folder = trained(tmp_path / "of", n_layers=of)
    model = tiny_llama(n_layers=on)
    before, names = weights(model), [name for name, _ in model.named_modules()]
    attributes, state = set(vars(model)), torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        train_lora(model, made_examples(), lora=LORA, trainer=TRAINER, seed=0, start_from=folder)
    with pytest.raises(ValueError, match=said):
        check_start(model, folder)
    assert [name for name, _ in model.named_modules()] == names
    assert set(vars(model)) == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_an_adapter_of_another_width_is_refused(tmp_path: Path):
    folder = trained(tmp_path / "of", n_layers=2)
    model = tiny_llama(d_mlp=56)
    with pytest.raises(ValueError, match=r"modules of other widths than this model's"):
        check_start(model, folder)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_an_adapter_fits_its_base_in_any_precision_of_both(tmp_path: Path):
    folder = trained(tmp_path / "of", n_layers=2)
    for saved in (torch.float32, torch.bfloat16):
        tensors = {name: t.to(saved) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model: Any = tiny_llama()
            check_start(model.to(dtype), folder)
