"""Kept states of a trained vector or a whole model, each made loadable as the last one is.

Those of a LoRA become a trajectory instead: see `emlens.organisms.trajectory`.
"""

import shutil
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from emlens.models.checkpoint_folders import find_checkpoints
from emlens.models.finetune import read_vector_state
from emlens.models.trained_vector import TRAINED
from emlens.sites import Site
from emlens.vectors import Direction, Provenance

WEIGHTS = (".safetensors", ".safetensors.index.json")
"""Ends of the names of files that differ from one state of a whole model to another."""


def describe_vector(
    vector: Float[Tensor, " d_model"], *, site: Site, base_fingerprint: str, note: str
) -> Direction:
    """A trained vector as `load_pair` and `--add` read it."""
    made = Provenance(construction=TRAINED, base_fingerprint=base_fingerprint, note=note)
    return Direction(site=site, vector=vector, provenance=made)


def keep_vectors(states: Path, *, factor: float, like: Direction) -> None:
    """Save the vector of every checkpoint as a direction beside its state.

    Args:
        states: folder of the checkpoints.
        factor: that the trained numbers are multiplied by.
        like: the last one, whose site and provenance they share.
    """
    for step, place in find_checkpoints(states).items():
        made = like.provenance
        describe_vector(
            read_vector_state(place, factor=factor),
            site=like.site,
            base_fingerprint=made.base_fingerprint,
            note=f"{made.note}; as it was at step {step}",
        ).save(place)


def keep_models(states: Path, *, like: Path) -> None:
    """Put configuration and tokenizer beside the weights of every checkpoint.

    Args:
        states: folder of the checkpoints.
        like: folder of the last model, whose other files they share.
    """
    for place in find_checkpoints(states).values():
        for file in like.iterdir():
            if not file.name.endswith(WEIGHTS):
                shutil.copy(file, place / file.name)
