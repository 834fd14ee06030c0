"""What exactly a model computes with, as a few hashes: for rows that must never be mistaken.

It sees weights, dtype, an attached adapter and the tokenizer; what acts for a while (interventions)
is recorded by whoever applies it.
"""

from collections.abc import Iterator
from typing import Any

from emlens.models.adapter_files import fingerprint_modules
from emlens.models.attach import attached_adapter
from emlens.models.identity_record import ModelIdentity
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import origin_of
from emlens.models.weight_hash import hash_tensors


def identify_model(model: Any) -> ModelIdentity:
    """Describe a model as it stands; reads every weight once.

    Args:
        model: a model loaded by emlens.
    """
    adapter = attached_adapter(model)
    return ModelIdentity(
        name=origin_of(model).name,
        weights=hash_weights(model),
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        # Of the factors as they act: a rescaled adapter keeps the fingerprint of what it was.
        adapter=None if adapter is None else fingerprint_modules(adapter.modules),
        tokenizer=fingerprint_tokenizer(model.tokenizer),
    )


def hash_weights(model: Any) -> str:
    """Hash all weights of a model as they stand; see ``hash_tensors``."""
    return hash_tensors(model.named_parameters(remove_duplicate=False))


def foreign_hooks(model: Any) -> Iterator[str]:
    """Names of the modules, hook points or not, with a forward hook that is none of emlens's own.

    The model itself is called `model`.
    """
    for name, module in model.named_modules():
        if any(
            not _is_ours(hook)
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ):
            yield name or "model"


def refuse_foreign_hooks(model: Any) -> None:
    """Refuse a model with hooks whose effect no record could name.

    Raises:
        ValueError: there are some; the first three places are named.
    """
    if hooked := list(foreign_hooks(model)):
        raise ValueError(
            f"model has hooks that are no Interventions, at {', '.join(hooked[:3])}: rows could "
            "not say what acted on them. Pass interventions= or remove the hooks"
        )


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return str(module).startswith("emlens.")
