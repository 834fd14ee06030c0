"""What the files of an adapter say, for linear layers and embeddings alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.models.adapter_files import load_adapter
from emlens.models.adapter_summary import summarise_adapter
from tests.models.adapters import make_peft, save_peft


@pytest.mark.parametrize("use_rslora", [False, True])
def test_norms_and_scales_are_those_of_peft(tmp_path: Path, use_rslora: bool):
    tuned = make_peft("llama", r=4, lora_alpha=8, use_rslora=use_rslora)
    summary = summarise_adapter(load_adapter(save_peft(tuned, tmp_path)))
    inner: Any = tuned.get_base_model()
    layers = {name: layer for name, layer in inner.named_modules() if hasattr(layer, "lora_A")}
    assert {module.name for module in summary.modules} == set(layers)
    for module in summary.modules:
        layer = layers[module.name]
        delta = layer.get_delta_weight("default")
        assert (module.d_out, module.d_in, module.rank) == (*delta.shape, 4)
        assert module.scale == pytest.approx(layer.scaling["default"])
        assert module.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert summary.rows()[0]["name"] == summary.modules[0].name


def test_a_negative_scale_has_a_positive_norm(tmp_path: Path):
    from emlens.models.lora import scale_adapter

    adapter = load_adapter(save_peft(make_peft("llama"), tmp_path))
    plain, flipped = summarise_adapter(adapter), summarise_adapter(scale_adapter(adapter, -2.0))
    norms = torch.tensor([[m.delta_norm for m in s.modules] for s in (plain, flipped)])
    torch.testing.assert_close(norms[1], 2 * norms[0])
    assert all(module.scale < 0 for module in flipped.modules)


def test_modules_come_in_the_order_of_their_layers(tmp_path: Path):
    adapter = load_adapter(save_peft(make_peft("llama"), tmp_path))
    lora = next(iter(adapter.modules.values()))
    names = [f"model.layers.{layer}.mlp.{part}" for layer in (10, 2) for part in ("up", "down")]
    many = replace(adapter, modules=dict.fromkeys([*names, "model.embed_tokens"], lora))
    found = [module.name for module in summarise_adapter(many).modules]
    assert found == ["model.embed_tokens", names[3], names[2], names[1], names[0]]
