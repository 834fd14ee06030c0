"""Random peft adapters on tiny models, every factor non-zero."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.models.tiny import make_tiny

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_peft(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """A peft model over a tiny base, B drawn at random instead of zero."""
    base = make_tiny(name, dtype=dtype)
    targets = settings.pop("target_modules", TARGETS.get(name.split("-")[0], ALL_LINEAR))
    given = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": name.startswith("gpt2")} | settings
    model = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            parameter.requires_grad_(False)
    return model.eval()


def save_peft(model: PeftModel, folder: Any) -> Any:
    """Write the adapter folder as peft does; returns the folder."""
    model.save_pretrained(folder)
    return folder
