"""Where a merge multiplies: beside the weights, which may be elsewhere than the factors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from emlens.models.adapter_files import load_adapter
from emlens.models.loading import load_base
from emlens.models.lora import find_targets
from emlens.models.merge import make_update, merge_adapter, merged_parameters
from tests.models.adapters import make_peft


class Products(TorchDispatchMode):
    """Remembers on which devices matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_factors_are_multiplied_beside_the_weights(name: str):
    peft_model = make_peft(name)
    model: Any = load_base(peft_model)
    adapter = load_adapter(peft_model)
    targets = find_targets(model, adapter)
    here = dict(merged_parameters(model, targets))
    nn.Module.to(model, "meta")
    with Products() as products:
        there = dict(merged_parameters(model, targets))
    assert products.devices == ["meta"] * len(adapter.modules)
    assert {key: x.shape for key, x in there.items()} == {key: x.shape for key, x in here.items()}
    assert {x.device.type for x in there.values()} == {"meta"}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_embeddings_is_made_beside_them_too(target: str):
    peft_model = make_peft("llama", target_modules=[target])
    model, adapter = load_base(peft_model), load_adapter(peft_model)
    with Products() as products:
        merge_adapter(model, adapter)
    assert products.devices == ["cpu"]
    nn.Module.to(model, "meta")
    with Products() as products:
        (lora,) = adapter.modules.values()
        assert make_update(lora, model.W_E.device).device.type == "meta"
    assert products.devices == ["meta"]


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_where_nothing_moves_an_update_has_the_bits_of_the_product(name: str):
    for lora in load_adapter(make_peft(name, lora_alpha=7)).modules.values():
        assert torch.equal(make_update(lora, torch.device("cpu")), lora.delta())
