"""Activations of a Hugging Face model, with gradients, at the sites of its hooked twin.

For terms of a training's loss. Whoever only measures reads a hooked model (`reading`).
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from emlens.models.config import Architecture, find_architecture
from emlens.sites import Site, SiteError

STREAMS = ("resid_pre", "resid_post", "attn_out", "mlp_out")
"""What a Hugging Face module takes in or puts out as it is."""
_POST_NORMS = {"attn_out": "ln1_post", "mlp_out": "ln2_post"}


class _ReachedError(Exception):
    """The site was read: nothing above it is needed."""


def find_host(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside whatever was put around it for training.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model: a {type(model).__name__} holds no Hugging Face model")


def check_host_site(model: nn.Module, site: Site, *, width: int) -> None:
    """Refuse a site that cannot be read in training, or of another width.

    Args:
        model: a Hugging Face model, or one inside something else.
        site: where.
        width: of what is to be read there.

    Raises:
        SiteError: a stream that no module takes in or puts out, a block that the model does not
            have, or another width.
    """
    config: Any = find_host(model).config.get_text_config()
    if site.stream not in STREAMS:
        raise SiteError(
            f"site: {site} cannot be read while a Hugging Face model is trained; expected one of "
            f"{', '.join(STREAMS)}"
        )
    if site.layer is None or site.layer >= config.num_hidden_layers:
        raise SiteError(
            f"site: the model has no {site}, its blocks are 0 to {config.num_hidden_layers - 1}"
        )
    if config.hidden_size != width:
        raise SiteError(
            f"site: {site} of this model is {config.hidden_size} wide, and {width} was expected: "
            "what is read there was made for another model"
        )


def read_host_site(
    model: nn.Module, site: Site, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos d_model"]:
    """Run a model up to a site and return the activation there, its graph included.

    Args:
        model: a Hugging Face model, bare or wrapped as training wraps it; called as a whole, so
            that adapters, added vectors and autocast act.
        site: see `check_host_site`.
        inputs: what the model is called with, such as `input_ids` and `attention_mask`.

    Raises:
        SiteError: see `check_host_site`.
    """
    found: list[Tensor] = []

    def keep(value: Any) -> None:
        found.append(value[0] if isinstance(value, tuple) else value)
        raise _ReachedError

    handle = _listen(find_host(model), site, keep)
    try:
        model(**inputs, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if not found:
        raise SiteError(f"site: {site} was never reached; the model does not use it")
    return found[0]


def _listen(host: PreTrainedModel, site: Site, keep: Callable[[Any], None]) -> Any:
    architecture = find_architecture(type(host).__name__)
    trunk = host.get_submodule(architecture.trunk)
    blocks: Any = trunk.get_submodule(architecture.blocks)
    block = blocks[site.layer]
    if site.stream == "resid_pre":

        def before(_module: Any, args: tuple, kwargs: dict) -> None:
            keep(args[0] if args else kwargs["hidden_states"])

        return block.register_forward_pre_hook(before, with_kwargs=True)
    module = block if site.stream == "resid_post" else _writer(block, site.stream, architecture)
    return module.register_forward_hook(lambda _module, _args, output: keep(output))


def _writer(block: nn.Module, stream: str, architecture: Architecture) -> nn.Module:
    """The module whose output joins the residual stream."""
    if architecture.post_norms:
        return block.get_submodule(architecture.norms[_POST_NORMS[stream]])
    linear = next(p.module for p in architecture.places if p.writes == (f"hook_{stream}",))
    return block.get_submodule(linear.rpartition(".")[0])
