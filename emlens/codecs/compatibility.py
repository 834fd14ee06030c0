"""Whether a codec can be used on a model, before anything is run; not whether it fits it well."""

from emlens.codecs.codec import CodecError, SparseCodec
from emlens.codecs.crosscoder import Crosscoder
from emlens.sites import SiteConfig, SiteError


def check_fits(
    codec: SparseCodec | Crosscoder,
    cfg: SiteConfig,
    *,
    base_fingerprint: str | None = None,
    allow_other_model: bool = False,
) -> None:
    """Raise unless a model has the codec's site, of its width, and is the model it was trained on.

    Where either side does not know which weights those are, only site and width are compared: a
    model of the same sizes passes, and how well the codec fits it is a matter of measurement.

    Args:
        codec: any.
        cfg: of the model.
        base_fingerprint: of the (base) model's weights, where that is known.
        allow_other_model: use a codec of other weights; say so where results are shown.

    Raises:
        CodecError: it does not fit; site, widths and models are named.
    """
    made_for = getattr(codec, "base_name", None)
    hint = f"; it was trained on {made_for}" if made_for else ""
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
    known = codec.base_fingerprint is not None and base_fingerprint is not None
    if known and codec.base_fingerprint != base_fingerprint and not allow_other_model:
        raise CodecError(
            f"codec: {codec.name} was trained on weights {codec.base_fingerprint}, and these are "
            f"{base_fingerprint}{hint}: pass allow_other_model=True if that is meant"
        )
