"""What sae_lens's configurations say, under a verdict: honoured, without effect, or refused.

Read from the JSON alone, without sae_lens. Fields that only training looked at are passed over:
older files hold the whole of their training's settings. `Source:` sae_lens 6.54, whose
`handle_pre_6_0_config` says what files older than 6.0 mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emlens.codecs.codec import CodecError
from emlens.codecs.normalization import NORMALIZATIONS, Normalization
from emlens.codecs.runtime import ARCHITECTURES
from emlens.sites import Site, SiteError, parse_site

SCALED = "expected_average_only_in"
"""Rows multiplied by one number for all, which must be folded into the weights."""
WHITENED = "covariance_whitening"
# Ways to process the weights of a language model that change its activations; emlens has none.
_PROCESSING = (
    *("center_writing_weights", "fold_ln", "fold_value_biases"),
    "refactor_factored_attn_matrices",
)
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# What files since 6.0 keep apart from what decides codes.
_METADATA = (
    *("hook_name", "hook_layer", "hook_head_index", "hook_name_out", "seqpos_slice"),
    *("model_name", "model_from_pretrained_kwargs", "neuronpedia_id"),
)
LARGEST_SIZE = 1 << 24
"""Latents or width from which on a number in a file is taken for a mistake, or for malice."""


@dataclass(frozen=True, kw_only=True)
class SaeLensConfig:
    """A configuration that can be honoured."""

    architecture: str
    """One of ours."""
    d_in: int
    """Width of an activation."""
    d_sae: int
    """Number of latents."""
    site: Site
    """Whose activations."""
    positions: str
    """Which tokens it was trained on."""
    k: int | None
    """Of `topk`."""
    rescale_by_decoder_norm: bool
    """Whether codes, and the choice among them, are scaled by the norms of decoder vectors."""
    apply_b_dec_to_input: bool
    """Whether b_dec is subtracted before encoding."""
    normalization: Normalization
    """What is done to each row."""
    scaled: bool
    """Whether rows were multiplied by a number that is not yet in the weights."""
    base_name: str | None
    """Model it was trained on."""
    neuronpedia_id: str | None
    """Where its latents are described."""


def read_sae_lens_config(config: Mapping[str, Any]) -> SaeLensConfig:
    """Read a configuration of sae_lens, of any of its versions.

    Raises:
        CodecError: something is missing, unknown, or not supported, by name.
    """
    fields = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise CodecError(f"metadata is {metadata!r}, expected an object")
    fields |= {name: metadata[name] for name in _METADATA if name in metadata}
    architecture, k = _read_architecture(fields)
    normalization = _read_normalization(fields.get("normalize_activations"))
    _refuse_unsupported(fields)
    site = _read_site(fields)
    return SaeLensConfig(
        architecture=architecture,
        d_in=_read_size(fields, "d_in"),
        d_sae=_read_size(fields, "d_sae"),
        site=site,
        positions=_read_positions(fields.get("seqpos_slice")),
        k=k,
        rescale_by_decoder_norm=_read_flag(fields, "rescale_acts_by_decoder_norm", False),
        apply_b_dec_to_input=_read_flag(fields, "apply_b_dec_to_input", True),
        normalization="none" if normalization == SCALED else normalization,
        scaled=normalization == SCALED,
        base_name=_read_text(fields, "model_name"),
        neuronpedia_id=_read_text(fields, "neuronpedia_id"),
    )


def _read_architecture(fields: Mapping[str, Any]) -> tuple[str, int | None]:
    architecture = fields.get("architecture", "standard")
    activation, given = fields.get("activation_fn", "relu"), fields.get("activation_fn_kwargs")
    k = fields.get("k", (given or {}).get("k") if isinstance(given, Mapping) else None)
    if architecture == "standard" and activation == "topk":  # how files before 6.0 say it
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise CodecError(
            f"architecture: {architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if activation not in ("relu", "topk") or (activation == "topk") > (architecture == "topk"):
        raise CodecError(f"activation_fn: {activation!r} of a {architecture} is not supported")
    if architecture != "topk":
        return architecture, None
    if type(k) is not int:
        raise CodecError(f"k: got {k!r}, expected how many latents of a token are active")
    return architecture, k


def _read_normalization(value: Any) -> Any:
    if value is None or isinstance(value, bool):  # how files of the first versions say it
        return SCALED if value else "none"
    if value == WHITENED:
        raise CodecError(
            f"normalize_activations: {WHITENED} is not in these weights; fold it with sae_lens's "
            "fold_activation_whitening and save again"
        )
    if value not in (*NORMALIZATIONS, SCALED):
        raise CodecError(
            f"normalize_activations: {value!r} is not supported; supported are "
            f"{', '.join((*NORMALIZATIONS, SCALED))}"
        )
    return value


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if (name := fields.get("hook_name_out")) is not None:
        raise CodecError(f"hook_name_out: {name!r}: this is a transcoder, which is not supported")
    if (head := fields.get("hook_head_index")) is not None:
        raise CodecError(f"hook_head_index: {head!r}: codecs of a single head are not supported")
    if fields.get("finetuning_scaling_factor"):
        raise CodecError("finetuning_scaling_factor: scaled codes are not supported; fold it first")
    reshape = fields.get("reshape_activations") or "none"
    if reshape not in ("none", "hook_z"):
        raise CodecError(f"reshape_activations: {reshape!r}, expected none or hook_z")
    options = fields.get("model_from_pretrained_kwargs") or {}
    if not isinstance(options, Mapping):
        raise CodecError(f"model_from_pretrained_kwargs is {options!r}, expected an object")
    if used := [name for name in _PROCESSING if options.get(name)]:
        raise CodecError(
            f"model_from_pretrained_kwargs: {used[0]}: this was trained on a model whose weights "
            "were processed; emlens leaves weights as they are, and its activations are others"
        )


def _read_site(fields: Mapping[str, Any]) -> Site:
    name, layer = fields.get("hook_name"), fields.get("hook_layer")
    if not isinstance(name, str):
        raise CodecError(f"hook_name: got {name!r}, expected such as 'blocks.24.hook_resid_post'")
    try:
        site = parse_site(name)
    except SiteError as error:
        raise CodecError(f"hook_name: {error}") from error
    if layer is not None and site.layer is not None and layer != site.layer:
        raise CodecError(f"hook_layer: {layer!r}, but hook_name is {name!r}")
    if (fields.get("reshape_activations") or "none") == "hook_z" and site.stream != "z":
        raise CodecError(f"reshape_activations: hook_z at {site}, which has no heads")
    return site


def _read_positions(value: Any) -> str:
    """Positions of a slice of the context; of every third token, say, as of all in between."""
    if value is None:
        return "all"
    edges = list(value) if isinstance(value, list | tuple) else []
    edges = [None, *edges] if len(edges) == 1 else edges  # as in Python, slice(8) ends at 8
    if len(edges) not in (2, 3) or not all(edge is None or type(edge) is int for edge in edges):
        raise CodecError(f"seqpos_slice: got {value!r}, expected [start, stop]")
    start, stop = ("" if edge is None else str(edge) for edge in edges[:2])
    return f"all[{start}:{stop}]" if start or stop else "all"


def _read_size(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value <= LARGEST_SIZE:
        raise CodecError(f"{name}: got {value!r}, expected a number from 1 to {LARGEST_SIZE}")
    return value


def _read_flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise CodecError(f"{name}: got {value!r}, expected true or false")
    return value


def _read_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise CodecError(f"{name}: got {value!r}, expected a text")
    return value
