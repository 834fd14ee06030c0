"""Put an adapter that is to be trained further onto a model, all of it or nothing.

peft itself leaves out what the model has no place for, and starts at random what the file lacks.
To run an adapter without training it, use `emlens.models.attach_adapter`.
"""

import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from emlens.models.adapter_files import load_adapter


def put_adapter_on(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap a model in the adapter of a PEFT folder, trainable; it is taken off again on an error.

    Args:
        model: the base that it was trained on.
        folder: of the adapter.

    Raises:
        ValueError: an adapter that cannot be honoured, or that does not fit the model; the first
            module without a counterpart is named.
    """
    try:
        tuned = _inject(model, folder)
        _check_whole(tuned, folder)
    except BaseException:
        remove_lora(model)
        raise
    return tuned


def remove_lora(model: nn.Module) -> None:
    """Put back the linear modules that an interrupted injection has already wrapped."""
    for name, module in list(model.named_modules()):
        base = getattr(module, "base_layer", None)
        if base is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, base)


def _inject(model: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        # What is missing is an error of `_check_whole`, which names it.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            raise ValueError(
                f"adapter: {folder} does not fit this model, which has none of the modules that it "
                f"adapts; was it trained on another base? {error}"
            ) from error
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"adapter: {folder} was trained on modules of other widths than this model's; "
                f"name the base that it was trained on. {str(error).splitlines()[-1].strip()}"
            ) from error


def _check_whole(tuned: PeftModel, folder: Path) -> None:
    """Compare what is on the model with what is in the file, number by number."""
    saved = load_adapter(folder, allow_noop=True).modules
    found = load_adapter(tuned, allow_noop=True).modules
    problem = ""
    if unused := sorted(set(saved) - set(found)):
        problem = f"the model has no {unused[0]}, which it adapts ({len(unused)} such modules)"
    elif missing := sorted(set(found) - set(saved)):
        problem = f"it has nothing for {missing[0]} of the model ({len(missing)} such modules)"
    else:
        for name, module in saved.items():
            own = found[name]
            for theirs, ours in ((module.A, own.A), (module.B, own.B)):
                if not torch.equal(theirs.to(ours.device, ours.dtype), ours):
                    problem = f"the numbers of {name} did not arrive"
    if problem:
        raise ValueError(
            f"adapter: {folder} does not fit this model: {problem}; was it trained on another base?"
        )
