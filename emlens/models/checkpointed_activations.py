"""Train with fewer activations in memory: those inside a block are computed again for its gradient.

It costs about one more forward pass a step, and changes gradients by rounding at most. It acts in
training mode alone: a pass in evaluation mode keeps its activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_FIELDS = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""What transformers' blocks read when they run."""


@contextmanager
def checkpointed_activations(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Keep only the inputs of blocks for the backward pass, for the length of a context.

    Args:
        model: holds transformers' blocks; they are as they were afterwards.
        wanted: False to change nothing.

    Raises:
        ValueError: it holds no block that can be run so.
    """
    if not wanted:
        yield
        return
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(
            f"checkpoint_activations: a {type(model).__name__} has no blocks that can be computed "
            "twice; leave it out"
        )
    before = [{name: vars(block).get(name) for name in _FIELDS} for block in blocks]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    # transformers' own switch would also hook the embeddings, which only reentrant passes need.
    run_twice = partial(checkpoint, use_reentrant=False)
    try:
        for block in blocks:
            block.gradient_checkpointing, block._gradient_checkpointing_func = True, run_twice
        if use_cache is not None:
            config.use_cache = False  # a block would drop the cache, and say so
        yield
    finally:
        for block, fields in zip(blocks, before, strict=True):
            for name, value in fields.items():
                if value is not None:
                    setattr(block, name, value)
                elif name in vars(block):
                    delattr(block, name)
        if use_cache is not None:
            config.use_cache = use_cache
