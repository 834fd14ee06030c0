"""Whether a codec can be used on a model, before anything is run; not whether it fits it well."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from emlens.codecs.codec import CodecError, SparseCodec
from emlens.codecs.crosscoder import Crosscoder
from emlens.sites import SiteConfig, SiteError

Codec = TypeVar("Codec")


def check_fits(
    codec: SparseCodec | Crosscoder, cfg: SiteConfig, *, weights: Sequence[str] = ()
) -> None:
    """Raise unless a model has the codec's site, of its width, and is the model it was trained on.

    Where either side does not know which weights those are, only site and width are compared: a
    model of the same sizes passes, and how well the codec fits it is a matter of measurement.

    Args:
        codec: any.
        cfg: of the model.
        weights: fingerprints of the model's weights and of those that they were made from
            (`origin_of(model).lineage`), any of which will do; of a pair those of its base.

    Raises:
        CodecError: it does not fit; site, widths and models are named.
    """
    hint = _name_base(codec)
    site = codec.site
    if site.layer is not None and site.layer >= cfg.n_layers:
        raise CodecError(
            f"codec: {codec.name} lives at {site}, but the model has {cfg.n_layers} layers, 0 to "
            f"{cfg.n_layers - 1}{hint}"
        )
    try:
        width = site.width(cfg)
    except SiteError as error:
        raise CodecError(
            f"codec: {codec.name} lives where the model has no width: {error}"
        ) from error
    if width != codec.d_in:
        raise CodecError(
            f"codec: {codec.name} takes activations of width {codec.d_in}, but {site} of the model "
            f"has width {width}{hint}"
        )
    check_weights(codec, weights)


def check_weights(codec: SparseCodec | Crosscoder, weights: Sequence[str]) -> None:
    """Raise unless weights are those that a codec was trained on, as far as both are known.

    Args:
        codec: any.
        weights: as `check_fits` takes them.

    Raises:
        CodecError: they are others.
    """
    if codec.base_fingerprint is None or not weights or codec.base_fingerprint in weights:
        return
    raise CodecError(
        f"codec: {codec.name} was trained on weights {codec.base_fingerprint}, and these are "
        f"{weights[-1]}{_name_base(codec)}; in float16 or quantised the same ones may count as "
        "others. Load it with allow_other_model=True (--allow-other-model), or pass "
        "allow_other_model(codec), if that is meant"
    )


def allow_other_model(codec: Codec) -> Codec:
    """The same codec for models of its sizes with any weights; its fingerprint stays the same.

    Results cannot say then whether it was trained on the weights that it was used on.

    Args:
        codec: an `Sae` or a `Crosscoder`.
    """
    own: Any = codec
    return (
        codec if own.base_fingerprint is None else dataclasses.replace(own, base_fingerprint=None)
    )


def _name_base(codec: SparseCodec | Crosscoder) -> str:
    made_for = getattr(codec, "base_name", None)
    return f"; it was trained on {made_for}" if made_for else ""
