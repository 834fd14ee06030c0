"""Autoencoders of sae_lens, in memory, to an `Sae`; not for its files (`files`)."""

import copy
from typing import Any

from emlens.codecs.codec import CodecError
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_lens_config import SCALED, read_sae_lens_config
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.codecs.sae_lens_weights import build_sae


def convert_sae(sae: Any, *, name: str | None = None, scaling_factor: float | None = None) -> Sae:
    """Copy an autoencoder of sae_lens; what is done to it later does not reach the copy.

    One that trains is copied as sae_lens would save it for use: BatchTopK and matryoshka with the
    threshold that they have so far.

    Args:
        sae: of any class of sae_lens whose architecture is supported.
        name: what the copy is called; None for sae_lens's own name.
        scaling_factor: by which number rows were multiplied, where they were
            (`expected_average_only_in`) and it is not folded into the weights.

    Raises:
        CodecError: no autoencoder of sae_lens, or something about it that is not supported, named.
    """
    sae_lens = import_sae_lens()
    if not isinstance(sae, sae_lens.SAE):
        raise CodecError(f"sae: got a {type(sae).__name__}, expected a sae_lens SAE")
    if scaling_factor is not None:
        if sae.cfg.normalize_activations != SCALED:
            raise CodecError(
                f"scaling_factor: got {scaling_factor}, but rows are not scaled: "
                f"normalize_activations of {sae.get_name()} is {sae.cfg.normalize_activations}"
            )
        sae = copy.deepcopy(sae)
        sae.fold_activation_norm_scaling_factor(scaling_factor)
    state = {key: value.detach().clone() for key, value in sae.state_dict().items()}
    if isinstance(sae, sae_lens.TrainingSAE):
        fields = sae.cfg.get_inference_sae_cfg_dict()
        sae.process_state_dict_for_saving_inference(state)
    else:
        fields = sae.cfg.to_dict()
    fields = {**fields, "metadata": sae.cfg.metadata.to_dict()}
    config = read_sae_lens_config(fields)
    return build_sae(config, state, name=name or sae.get_name())
