"""The random adapters that stand for the published kinds of fine-tune."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.settings import Settings
from emlens.models.lora import LoraAdapter, LoraModule

DOWN = ("mlp.down_proj",)
ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
MODULES = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", *DOWN)
"""Every linear module of a Llama or Qwen2 block."""
READS = dict.fromkeys(ATTENTION[:3], "attn") | {"mlp.gate_proj": "mlp", "mlp.up_proj": "mlp"}
"""Modules that read one tensor, whose A can be multiplied at once."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One adapter and the first layer it changes."""

    name: str
    adapter: LoraAdapter
    first_layer: int

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(module.rank for module in self.adapter.modules.values())

    def touched_bytes(self, hf: PreTrainedModel) -> int:
        """Bytes of the matrices that the adapter changes."""
        weights = (weight_of(hf, name) for name in self.adapter.modules)
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @classmethod
    def down_proj(cls, hf: PreTrainedModel, layers: Sequence[int], *, name: str) -> "Case":
        """Rank 1 on the MLP's output in some layers."""
        return cls(name=name, adapter=_draw(hf, layers, DOWN, 1, name), first_layer=min(layers))

    @classmethod
    def all_modules(cls, hf: PreTrainedModel, rank: int) -> "Case":
        """A rank on every linear module of every layer."""
        name = f"every module, rank {rank}"
        layers = range(hf.config.get_text_config().num_hidden_layers)
        return cls(name=name, adapter=_draw(hf, layers, MODULES, rank, name), first_layer=0)


def make_cases(hf: PreTrainedModel, settings: Settings) -> tuple[Case, ...]:
    """One middle layer; nine layers from the first third on; every module at rank 1 and 32."""
    n_layers = hf.config.get_text_config().num_hidden_layers
    start = round(0.3 * n_layers)
    nine = sorted({start + round(i * (0.95 * n_layers - start) / 9) for i in range(9)})
    return (
        Case.down_proj(hf, [n_layers // 2], name="one down_proj, rank 1"),
        Case.down_proj(hf, nine, name="nine down_proj, rank 1"),
        Case.all_modules(hf, 1),
        Case.all_modules(hf, 32),
    )


def weight_of(hf: PreTrainedModel, name: str) -> Tensor:
    """A module's matrix [d_out d_in]."""
    weight = hf.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _draw(
    hf: PreTrainedModel, layers: Sequence[int], modules: Sequence[str], rank: int, name: str
) -> LoraAdapter:
    """Random factors whose product is a twentieth of each weight's norm."""
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for layer in layers:
        for module in modules:
            path = f"model.layers.{layer}.{module}"
            weight = weight_of(hf, path)
            A = torch.randn(rank, weight.shape[1], generator=generator)
            B = torch.randn(weight.shape[0], rank, generator=generator)
            size = float(weight.float().norm()) / (rank * A[0].numel() * B[:, 0].numel()) ** 0.5
            factors[path] = LoraModule(
                A=A.to(hf.device, hf.dtype),
                B=(0.05 * size * B).to(hf.device, hf.dtype),
                scale=1.0,
            )
    return LoraAdapter(modules=factors, name=name, fingerprint=name)


def multiply_adapter(hf: PreTrainedModel, adapter: LoraAdapter, rows: int) -> Callable[[], None]:
    """The adapter's own multiplications over ``rows`` tokens, and nothing else.

    Factors that read one tensor are stacked; each update is added into an output that exists.
    """
    groups: dict[tuple[str, str], list[LoraModule]] = {}
    for path, lora in adapter.modules.items():
        block, module = path.split(".", 3)[2], path.split(".", 3)[3]
        groups.setdefault((block, READS.get(module, module)), []).append(lora)
    stacks = [torch.cat([lora.A for lora in group]) for group in groups.values()]
    inputs = {w: torch.randn(rows, w).to(stacks[0]) for w in {A.shape[1] for A in stacks}}
    outputs = {
        len(lora.B): torch.zeros(rows, len(lora.B)).to(lora.B) for lora in adapter.modules.values()
    }

    @torch.inference_mode()
    def multiply() -> None:
        for A, group in zip(stacks, groups.values(), strict=True):
            read = nn.functional.linear(inputs[A.shape[1]], A)
            start = 0
            for lora in group:
                stop = start + lora.rank
                outputs[len(lora.B)].addmm_(read[:, start:stop], lora.B.mT)
                start = stop

    return multiply
