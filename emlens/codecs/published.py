"""Published codecs that are pickled: how each collection lays them out, and what they were made of.

Two layouts are read here; others are sae_lens's to read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from emlens.codecs.codec import CodecError
from emlens.codecs.conversions import convert_once
from emlens.codecs.files import naming, read_config
from emlens.codecs.pickles import read_pickled_tensors
from emlens.codecs.runtime import Sae
from emlens.codecs.sae_lens_config import read_sae_lens_config
from emlens.codecs.sae_lens_weights import build_sae, expected_shapes
from emlens.sources import Source

WITHOUT_FIRST = "all[8:]"
"""Positions of codecs that were trained without the first eight tokens of a text, whose norms are
tens of times those of the others."""
_WITHOUT_FIRST = re.compile(r"andyrdt/saes-[^/]+(@[^/]+)?(/.*)?|.*-andyrdt(#.*)?")
"""The collections trained so, by where they are published."""
_WITHOUT_FIRST_OF = frozenset(
    {"Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "openai/gpt-oss-20b"}
)
"""The models that they are of: what a copy still says of them."""

DICTIONARY_LEARNING, DICTIONARY_CONFIG = "ae.pt", "config.json"
"""Files of the package dictionary_learning."""
QWEN_SCOPE = re.compile(r"layer(\d+)\.sae\.pt")
_QWEN_SCOPE_K = re.compile(r"SAE-Res-(?P<base>.+)-W\d+K-L0_(?P<k>\d+)")

# dictionary_learning's class -> architecture, and whether b_dec is subtracted before encoding.
_CLASSES = {
    "AutoEncoder": ("standard", True),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka_batchtopk", True),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
# sae_lens's name -> how the classes above call it, and whether theirs is transposed.
_DICTIONARY_NAMES = {
    "W_enc": (("W_enc", False), ("encoder.weight", True)),
    "W_dec": (("W_dec", False), ("decoder.weight", True)),
    "b_dec": (("b_dec", False), ("bias", False), ("decoder_bias", False)),
    "b_enc": (("b_enc", False), ("encoder.bias", False)),
    "b_gate": (("gate_bias", False),),
    "b_mag": (("mag_bias", False),),
    "r_mag": (("r_mag", False),),
    "threshold": (("threshold", False),),
}
_PASSED_OVER = frozenset({"k", "threshold", "group_sizes"})
"""What is saved beside weights; a threshold of a class that chooses its latents otherwise."""


def default_positions(source: Source, *, base_name: str | None) -> str:
    """Which tokens a codec of dictionary_learning was trained on, as far as is known.

    A path says nothing of who published what lies there. A local codec of one of the models that
    the collections without first tokens are of is taken for one of theirs: leaving out eight tokens
    costs little, and counting them where codes mean nothing costs everything.

    Args:
        source: where it was found.
        base_name: the model that its configuration names.
    """
    if source.kind == "path":
        return WITHOUT_FIRST if base_name in _WITHOUT_FIRST_OF else "all"
    return WITHOUT_FIRST if _WITHOUT_FIRST.fullmatch(source.text) else "all"


def is_dictionary(folder: Path) -> bool:
    """Whether a folder holds an autoencoder of dictionary_learning."""
    return (folder / DICTIONARY_LEARNING).exists()


def read_dictionary(folder: Path, *, name: str) -> Sae:
    """Read an autoencoder of dictionary_learning: `ae.pt` and `config.json`.

    Raises:
        CodecError: a class, a site or a file that is not supported, named.
    """
    with naming(folder):
        config = _read_trainer(read_config(folder, DICTIONARY_CONFIG).get("trainer"))

        def convert() -> Sae:
            tensors = _rename(read_pickled_tensors(folder, DICTIONARY_LEARNING), config)
            return _build(config, tensors, name)

        return convert_once(folder, DICTIONARY_LEARNING, convert, name=name, said=config)


def read_qwen_scope(folder: Path, file: str, *, name: str, collection: str) -> Sae:
    """Read an autoencoder of Qwen Scope: `layerN.sae.pt`, of a repository whose name says its k.

    Args:
        folder: where it lies.
        file: its name.
        name: the source.
        collection: the repository, such as `Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`.

    Raises:
        CodecError: another name or layout.
    """
    layer, said = QWEN_SCOPE.fullmatch(file), _QWEN_SCOPE_K.search(collection)
    if layer is None or said is None:
        raise CodecError(
            f"{collection}: {file}: expected layerN.sae.pt in a repository named "
            "...SAE-Res-MODEL-WnK-L0_k, which says what it was trained on"
        )
    with naming(folder):
        config = {
            "architecture": "topk",
            "k": int(said["k"]),
            "hook_name": f"blocks.{layer[1]}.hook_resid_post",
            "apply_b_dec_to_input": False,
            "model_name": f"Qwen/{said['base']}",
        }

        def convert() -> Sae:
            tensors = read_pickled_tensors(folder, file)
            turned = {key: value.T if value.ndim == 2 else value for key, value in tensors.items()}
            sizes = turned["W_enc"].shape if "W_enc" in turned else (0, 0)
            return _build(config | dict(zip(("d_in", "d_sae"), sizes, strict=False)), turned, name)

        return convert_once(folder, file, convert, name=name, said=config)


def _read_trainer(trainer: Any) -> dict[str, Any]:
    """What a configuration of dictionary_learning says, by sae_lens's names."""
    if not isinstance(trainer, Mapping):
        raise CodecError(f"{DICTIONARY_CONFIG}: trainer is {trainer!r}, expected an object")
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise CodecError(
            f"dict_class: {kind!r} is not supported; supported are {', '.join(_CLASSES)}"
        )
    where = trainer.get("submodule_name")
    if isinstance(where, str) and re.search(r"attn|attention|mlp", where):
        raise CodecError(f"submodule_name: {where!r}: only the residual stream is supported")
    layer = trainer.get("layer")
    if type(layer) is not int:
        raise CodecError(f"layer: got {layer!r}, expected the block after which it lives")
    architecture, subtracts = _CLASSES[kind]
    return {
        "architecture": architecture,
        "k": trainer.get("k"),
        "d_in": trainer.get("activation_dim"),
        "d_sae": trainer.get("dict_size"),
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "apply_b_dec_to_input": subtracts,
        "model_name": trainer.get("lm_name"),
    }


def _build(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Sae:
    whole = {key: value.contiguous() for key, value in tensors.items()}
    return build_sae(read_sae_lens_config(config), whole, name=name)


def _rename(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by sae_lens's names, matrices its way round."""
    wanted = expected_shapes(read_sae_lens_config(config))
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, names in _DICTIONARY_NAMES.items():
        theirs = [(name, turned) for name, turned in names if name in tensors and ours in wanted]
        for name, turned in theirs:
            used.add(name)
            found[ours] = tensors[name].T if turned else tensors[name]
    if unknown := sorted(tensors.keys() - used - _PASSED_OVER):
        raise CodecError(f"{DICTIONARY_LEARNING}: {unknown} have no place in this class")
    if config["architecture"] == "topk" and "k" in tensors and int(tensors["k"]) != config["k"]:
        raise CodecError(f"k: {config['k']} in {DICTIONARY_CONFIG}, {int(tensors['k'])} in weights")
    if (threshold := found.get("threshold")) is not None and threshold.ndim == 0:
        if float(threshold) < 0:
            raise CodecError("threshold: below zero, as before training sets one")
        found["threshold"] = threshold.expand(wanted["threshold"])
    return found
