"""A model that owns its weights, so that editing them in place reaches no other model.

Loading, attaching and merging share weights; use this only before an edit.
"""

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.models.attach import attach_adapter, attached_adapter
from emlens.models.views import share_model


def copy_weights(model: HookedTransformer) -> HookedTransformer:
    """Return a model with a copy of every weight; ties and an attached adapter are kept.

    Hooks of the user's are not carried over.
    """
    copies: dict[tuple[int, int], Tensor] = {}
    owned: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = parameter.detach()
        key = (value.data_ptr(), value.numel())
        if key not in copies:
            copies[key] = value.clone(memory_format=torch.preserve_format)
            owned[name] = copies[key]
        else:  # tied: another view of the same numbers
            owned[name] = copies[key].as_strided(value.shape, value.stride())
    shell = share_model(model, owned, edit="")
    adapter = attached_adapter(model)
    return shell if adapter is None else attach_adapter(shell, adapter)
