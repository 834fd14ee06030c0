"""Planned bytes are the bytes that are then allocated."""

from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.data import Batching
from emlens.models.adapter_files import load_adapter
from emlens.models.kv_cache import KeyValueCache
from emlens.models.loading import load_base
from emlens.models.memory import ASSUMED_RANK, MemoryPlan, plan_memory, read_sizes
from emlens.numerics.blocks import MAX_LOGITS
from tests.models.adapters import ALL_LINEAR, TARGETS, make_peft
from tests.models.tiny import PLAIN, make_tiny
from tests.tiny_files import save_tiny_adapter, save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize("name", PLAIN)
def test_weights_are_those_of_the_loaded_model_in_every_architecture(name: str, tmp_path: Path):
    model: Any = make_tiny(name)
    model.save_pretrained(str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_memory(tmp_path, dtype=str(dtype).removeprefix("torch."))
        held = sum(p.numel() * p.element_size() for p in model.to(dtype).parameters())
        assert plan.weights == held


@pytest.mark.parametrize("name", PLAIN)
def test_the_assumed_adapter_is_one_on_every_linear_module(name: str, tmp_path: Path):
    make_tiny(name).save_pretrained(str(tmp_path))
    targets = TARGETS.get(name.split("-")[0], ALL_LINEAR)
    tuned: Any = make_peft(name, r=ASSUMED_RANK, target_modules=targets)
    factors = [p for key, p in tuned.named_parameters() if "lora_" in key]
    touched = [m.base_layer.weight for m in tuned.modules() if hasattr(m, "base_layer")]
    plan = plan_memory(tmp_path)
    assert plan.adapter_attached == 4 * sum(p.numel() for p in factors)
    assert plan.adapter_merged == 4 * sum(p.numel() for p in touched)


def test_a_given_adapter_adds_its_factors_or_the_matrices_that_it_touches(
    base: Path, adapter: Path
):
    plan = plan_memory(base, adapter=adapter)
    assert plan.adapter_attached == load_adapter(adapter).n_bytes
    assert plan.adapter_merged == 2 * 4 * (24 * 24 + 24 * 24 + 24 * 40)  # q, o, down; two layers
    assert plan.base_and_attached == plan.weights + plan.adapter_attached
    assert plan.base_and_merged == plan.weights + plan.adapter_merged


def test_the_cache_is_as_large_as_the_one_that_is_made(base: Path):
    plan = plan_memory(base, batch=3, length=50)
    cache = KeyValueCache(load_base(base), batch=3, capacity=50)
    held = sum(t.numel() * t.element_size() for e in cache.entries for t in (e.keys, e.values))
    assert plan.key_value_cache == held
    assert plan.packed_weights == plan.weights


def test_logits_never_exceed_the_slice_and_activations_grow_with_the_batch(base: Path):
    small, large = (plan_memory(base, batching=Batching(n)) for n in (64, 10**7))
    assert large.logits <= 4 * MAX_LOGITS
    assert small.logits == 4 * 32 * small.sizes.d_vocab * 4  # half of 64 tokens are the base's
    assert large.activations // 10**7 == small.activations // 64


def test_rows_sum_up_what_a_comparison_takes(base: Path):
    plan = plan_memory(base)
    rows = {row["item"]: row["bytes"] for row in plan.rows()}
    # A pair keeps the adapter as it was read beside what is attached.
    kept = rows["base_and_attached"] + plan.adapter_attached + rows["statistics"]
    assert rows["comparison"] == kept + rows["residuals"] + rows["logits"]
    long = plan_memory(base, batching=Batching(10**7))
    assert long.activations > long.residuals + long.logits
    assert long.comparison - long.statistics == kept - plan.statistics + long.activations
    assert isinstance(plan, MemoryPlan)


def test_sizes_are_those_of_the_config_and_its_dtype(base: Path):
    sizes = read_sizes(base)
    assert (sizes.n_layers, sizes.d_model, sizes.d_head, sizes.d_mlp) == (2, 24, 6, 40)
    assert (sizes.n_heads, sizes.n_key_value_heads, sizes.n_ctx) == (4, 2, 512)
    assert sizes.dtype == "float32"


def test_a_folder_without_config_or_with_an_adapter_is_refused(tmp_path: Path, adapter: Path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_sizes(tmp_path)
    with pytest.raises(ValueError, match="LoRA adapter"):
        read_sizes(adapter)
