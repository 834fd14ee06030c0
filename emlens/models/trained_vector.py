"""A trained vector as a fine-tune: one bias of a model that shares all else with its base.

Not for directions that were estimated: `emlens.interventions` adds those, and takes them out.
"""

from pathlib import Path

from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.artifacts import JSON_NAME, read_kind, read_result
from emlens.encoding import ArtifactError
from emlens.models.config import Architecture
from emlens.models.lora import architecture_of, read_parameter
from emlens.models.views import origin_of, share_model
from emlens.sources import Source, locate_source, parse_source
from emlens.vectors import Direction

TRAINED = "trained"
"""Construction of a vector that is a fine-tune."""
_BIASES = {"mlp_out": "mlp.b_out", "attn_out": "attn.b_O"}
"""Stream that a vector is added to, and the bias that adds it."""


def is_vector(source: str | Path | Source) -> bool:
    """Whether a source is the folder of a saved direction."""
    path = locate_source(parse_source(source), allow_patterns=[JSON_NAME])
    try:
        return (path / JSON_NAME).is_file() and read_kind(path) == Direction.kind
    except ArtifactError:  # a file of that name that is none of ours
        return False


def load_vector(source: str | Path | Source) -> Direction:
    """Read a vector that a fine-tune learnt.

    Raises:
        ValueError: a direction that was made in another way, whose strength nothing states.
        ArtifactError: a damaged file.
        SourceError: there is no such source.
    """
    path = locate_source(parse_source(source), allow_patterns=[JSON_NAME, "*.safetensors"])
    direction = read_result(path, Direction)
    made = direction.provenance.construction
    if made != TRAINED:
        raise ValueError(
            f"{source} holds a direction made as {made!r}, which is no fine-tune: how strongly "
            "it is to act is not part of it; use add_direction, or --add FILE:COEF:UNITS"
        )
    return direction


def check_vector_site(architecture: Architecture, stream: str) -> None:
    """Refuse a stream where what a module puts out is not what joins the residual stream.

    Raises:
        ValueError: another stream than those of attention and MLP, or a norm in between.
    """
    if stream not in _BIASES:
        raise ValueError(f"a vector at {stream}, expected one at {' or '.join(_BIASES)}")
    if architecture.post_norms:
        raise ValueError(
            f"{architecture.name} norms what its attention and MLPs write before it joins the "
            "residual stream, so that a vector added to their output is none at a site; train a "
            "LoRA"
        )


def add_vector(base: HookedTransformer, direction: Direction, *, name: str) -> HookedTransformer:
    """Return a new model that adds a trained vector at its site, at every token.

    Args:
        base: the model that the vector was trained on; it stays as it was.
        direction: at `mlp_out` or `attn_out`, added as it is.
        name: what the new model is called.

    Raises:
        ValueError: another base than its own, a site that has no bias of its own, or a vector of
            another width.
    """
    made, known = direction.provenance.base_fingerprint, origin_of(base).lineage
    if made and made not in known:
        raise ValueError(
            f"tuned: the vector {name} was trained on weights {made}, and {origin_of(base).name} "
            f"is {known[-1]}; name the base that it was trained on"
        )
    site = direction.site
    check_vector_site(architecture_of(base), site.stream)
    if site.layer is None or site.layer >= base.cfg.n_layers:
        raise ValueError(f"tuned: the vector {name} is at {site}, and the base has no such block")
    bias = f"blocks.{site.layer}.{_BIASES[site.stream]}"
    own: Tensor = read_parameter(base, bias)
    if own.shape != direction.vector.shape:
        raise ValueError(
            f"tuned: the vector {name} has {direction.width} entries, and {site} of "
            f"{origin_of(base).name} has {len(own)}"
        )
    moved = own + direction.vector.to(own.device, own.dtype)
    return share_model(base, {bias: moved}, name=name)
