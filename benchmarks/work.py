"""FLOPs and bytes of a pass, by formula: what a time is held against to state utilisation."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from benchmarks.models import linear_weights


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be done, however it is done."""

    flops: int
    """Of matrix products; an addition and a multiplication are two."""
    bytes: int
    """Of weights read once, and of the cache read and written."""

    def times(self, n: int) -> "Work":
        """The same n times over."""
        return Work(flops=n * self.flops, bytes=n * self.bytes)

    def plus(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


def count_decode(hf: PreTrainedModel, batch: int, prompt: int, new: int) -> Work:
    """Prompts of equal length and ``new`` tokens after each, through a cache."""
    step = count_pass(hf, batch, 1, held=prompt + new // 2)
    return count_pass(hf, batch, prompt, logits=1).plus(step.times(new - 1))


def count_pass(
    hf: PreTrainedModel, batch: int, new: int, *, held: int = 0, logits: int | None = None
) -> Work:
    """One pass of ``new`` tokens a row on top of ``held`` in a cache.

    2 flops a token and weight; attention 4 d_head a head and pair of a query and a key it sees.

    Args:
        hf: whose sizes.
        batch: rows.
        new: tokens of each row that are run.
        held: tokens of each row that a cache holds.
        logits: tokens of each row that are unembedded; all that are run by default.
    """
    config: Any = hf.config.get_text_config()
    *blocks, unembed = linear_weights(hf)
    inner = sum(weight.numel() for weight in blocks)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = new * held + new * (new + 1) // 2
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * d_head * pairs
    shown = new if logits is None else logits
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * d_head * (held + new)
    size = unembed.element_size()
    return Work(
        flops=batch * (2 * new * inner + attention + 2 * shown * unembed.numel()),
        bytes=size * (inner + (unembed.numel() if shown else 0) + batch * kept),
    )
