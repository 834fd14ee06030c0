"""Weights as sae_lens names and scales them, to an `Sae`; they are checked before they are used."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emlens.codecs.codec import CodecError
from emlens.codecs.frozen import check_dtype
from emlens.codecs.runtime import WITH_THRESHOLD, Sae
from emlens.codecs.sae_lens_config import SaeLensConfig

_OURS = {"b_gate": "b_enc"}


def expected_shapes(config: SaeLensConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a configuration, by sae_lens's names."""
    d_in, d_sae = config.d_in, config.d_sae
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    vectors = ["b_enc"]
    if config.architecture == "gated":
        vectors = ["b_gate", "r_mag", "b_mag"]
    elif config.architecture in WITH_THRESHOLD:
        vectors = ["b_enc", "threshold"]
    return shapes | dict.fromkeys(vectors, (d_sae,))


def check_shapes(found: Mapping[str, tuple[int, ...]], config: SaeLensConfig) -> None:
    """Raise unless there are exactly the weights that a configuration asks for.

    Raises:
        CodecError: a weight is missing, unknown, or of another shape.
    """
    expected = expected_shapes(config)
    if missing := sorted(expected.keys() - found.keys()):
        raise CodecError(f"weights: {missing} are missing of a {config.architecture}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise CodecError(f"weights: {unknown} have no place in a {config.architecture}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CodecError(f"weights: {name} has shape {tuple(found[name])}, expected {shape}")


def build_sae(
    config: SaeLensConfig,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    scaling_factor: float | None = None,
    dtype: torch.dtype | None = None,
) -> Sae:
    """Make an `Sae` of sae_lens's weights, with all that scales codes folded in.

    Rows multiplied by s, then encoded: W_enc s, W_dec / s, b_dec / s. Codes scaled by the norms v
    of decoder vectors, and back before decoding: W_enc v, b_enc v, W_dec / v. In this order, so
    that codes are what sae_lens gives after its own folding.

    Args:
        config: what the weights are.
        tensors: by sae_lens's names; left as they are.
        name: the source.
        scaling_factor: s, where the configuration says that rows are scaled.
        dtype: of the result; None for that of W_enc.

    Raises:
        CodecError: weights that do not fit, or a factor that is missing or has no use.
    """
    check_shapes({key: tuple(value.shape) for key, value in tensors.items()}, config)
    for key, value in tensors.items():
        check_dtype(key, value.dtype)
    weights: dict[str, Any] = dict(tensors)
    dtype = dtype or tensors["W_enc"].dtype
    if config.scaled != (scaling_factor is not None):
        raise CodecError(
            f"scaling_factor: got {scaling_factor}, but rows are {'' if config.scaled else 'not '}"
            "scaled by a number (normalize_activations: expected_average_only_in). Where it is "
            "missing, fold it with sae_lens's fold_activation_norm_scaling_factor first"
        )
    if config.scaled or config.rescale_by_decoder_norm:
        # In half precision a product here would be rounded once more than sae_lens's own.
        wide = torch.promote_types(dtype, torch.float32)
        weights = {key: value.to(wide) for key, value in weights.items()}
    if scaling_factor is not None:
        weights |= {"W_enc": weights["W_enc"] * scaling_factor}
        weights |= {key: weights[key] / scaling_factor for key in ("W_dec", "b_dec")}
        if "threshold" in weights and config.rescale_by_decoder_norm:  # it is one of scaled codes
            weights["threshold"] = weights["threshold"] / scaling_factor
    if config.rescale_by_decoder_norm:
        weights |= _fold_decoder_norms(weights)
    return Sae(
        name=name,
        architecture=config.architecture,
        site=config.site,
        positions=config.positions,
        k=config.k,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        normalization=config.normalization,
        base_name=config.base_name,
        neuronpedia_id=config.neuronpedia_id,
        **{_OURS.get(key, key): value.to(dtype) for key, value in weights.items()},
    )


def _fold_decoder_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    norms = torch.linalg.vector_norm(weights["W_dec"], dim=1)
    # A latent whose vector is zero has codes of zero, and adds nothing.
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] * inverse[:, None],
    }
