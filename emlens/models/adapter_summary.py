"""What an adapter's files say, before any base is loaded: modules, ranks, scales, norms.

It cannot say whether the adapter is in effect: that is `verify_adapter`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from emlens.artifacts import Result
from emlens.models.lora import LoraAdapter
from emlens.numerics.lowrank import frobenius_norm_product


@dataclass(frozen=True, kw_only=True)
class AdapterModule:
    """One adapted module."""

    name: str
    d_in: int
    d_out: int
    rank: int
    scale: float
    """alpha / rank, or alpha / sqrt(rank) under rsLoRA."""
    delta_norm: float
    """||scale B A||_F."""


@dataclass(frozen=True, kw_only=True)
class AdapterSummary(Result):
    """An adapter by its files alone."""

    kind: ClassVar[str] = "adapter_summary"

    adapter: str
    adapter_fingerprint: str
    base: str | None
    """The base that the adapter names, if any."""
    base_fingerprint: str | None
    """Of the weights that it was trained on, where that was recorded."""
    n_bytes: int
    """Of all factors as they are stored."""
    config_verdicts: tuple[tuple[str, str, str], ...]
    """(field, value, what was done with it) for each field that was not inert."""
    modules: tuple[AdapterModule, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row a module."""
        return [dataclasses.asdict(module) for module in self.modules]


def summarise_adapter(adapter: LoraAdapter) -> AdapterSummary:
    """List the modules of an adapter that was read, with their sizes."""
    return AdapterSummary(
        adapter=adapter.name,
        adapter_fingerprint=adapter.fingerprint,
        base=adapter.base_name,
        base_fingerprint=adapter.base_fingerprint,
        n_bytes=adapter.n_bytes,
        config_verdicts=adapter.verdicts,
        modules=tuple(
            AdapterModule(
                name=name,
                d_in=lora.A.shape[1],
                d_out=lora.B.shape[0],
                rank=lora.rank,
                scale=lora.scale,
                delta_norm=abs(lora.scale)
                * float(frobenius_norm_product(lora.B.double(), lora.A.double())),
            )
            for name, lora in sorted(adapter.modules.items(), key=lambda item: _order(item[0]))
        ),
    )


def _order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10: the numbers in a name count as numbers."""
    parts = name.split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
