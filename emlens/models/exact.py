"""The logits that weights stand for, in float64, one block at a time: they tell what is rounding.

Only one block is ever there in float64, so that a model that fills the device can be judged on it.
Slow, and for few short texts: it has neither cache nor padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.utilities.activation_functions import apply_softcap

from emlens.models.attach import attach_adapter, attached_adapter
from emlens.models.views import share_model


def share_exact(model: HookedTransformer) -> HookedTransformer:
    """Return a shell over the same weights and adapter for `exact_logits`, and for nothing else.

    Interventions act on the shell as they would on the model, in float64. The user's hooks are not
    carried over.
    """
    shell = share_model(model)
    shell.cfg.dtype = torch.float64  # the shell's own: sharing copied it
    adapter = attached_adapter(model)
    # Laid once more, so that every component is built with the wider dtype.
    return share_model(shell) if adapter is None else attach_adapter(shell, adapter)


@torch.no_grad()
def exact_logits(
    shell: HookedTransformer, ids: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run ids without padding through a shell that `share_exact` made; logits in float64.

    Raises:
        ValueError: a model that is no such shell.
    """
    if shell.cfg.dtype != torch.float64:
        raise ValueError(
            f"shell: it runs in {shell.cfg.dtype}, expected float64; make it by share_exact(model)"
        )
    ids = ids.to(shell.embed.W_E.device)
    with _in_float64(shell.embed):
        resid = shell.hook_embed(shell.embed(ids))
    if shell.cfg.positional_embedding_type == "standard":
        with _in_float64(shell.pos_embed):
            resid = resid + shell.hook_pos_embed(shell.pos_embed(ids, 0, None))
    for block in shell.blocks:
        with _in_float64(block):
            resid = block(resid)
    with _in_float64(shell.ln_final), _in_float64(shell.unembed):
        logits = shell.unembed(shell.ln_final(resid))
    return apply_softcap(logits, shell.cfg.output_logits_soft_cap)


@contextmanager
def _in_float64(module: nn.Module) -> Iterator[None]:
    """Put float64 copies in a module's places for parameters; what others share stays as it is."""
    held = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    try:
        for part, name, parameter in held:
            part._parameters[name] = nn.Parameter(parameter.detach().double(), requires_grad=False)
        yield
    finally:
        for part, name, parameter in held:
            part._parameters[name] = parameter
