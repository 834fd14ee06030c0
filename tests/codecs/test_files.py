"""Codecs in folders: read back bit for bit, and nothing hostile or half there is taken for one."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emlens.codecs import CodecError, load_crosscoder, load_sae, save_sae
from emlens.codecs.runtime import ARCHITECTURES, WITH_THRESHOLD
from emlens.results import load_result
from tests.codecs.builders import SITE, draw, make_crosscoder, make_sae

X = draw(30, 12, seed=9)
CONFIG: dict[str, Any] = {
    "architecture": "standard",
    "d_in": 12,
    "d_sae": 96,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.54.0", "hook_name": SITE.hook_name},
}


def write_sae_lens(folder: Path, **changes: Any) -> Path:
    """A folder as sae_lens writes it, without sae_lens."""
    sae = make_sae(changes.get("architecture", "standard"))
    folder.mkdir(exist_ok=True)
    metadata = CONFIG["metadata"] | changes.pop("metadata", {})
    config = CONFIG | {"metadata": metadata} | changes
    (folder / "cfg.json").write_text(json.dumps(config))
    names = {"b_enc": "b_gate"} if sae.architecture == "gated" else {}
    fields = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag")
    weights = {names.get(name, name): getattr(sae, name) for name in fields}
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_is_read_back_bit_for_bit(
    tmp_path: Path, architecture: str, dtype: torch.dtype
):
    sae = make_sae(
        architecture,
        dtype=dtype,
        normalization="layer_norm",
        apply_b_dec_to_input=False,
        positions="all[8:]",
        base_fingerprint="abc",
        neuronpedia_id="model/3-set",
    )
    read = load_sae(save_sae(sae, tmp_path), dtype="auto", device="cpu")
    assert read.fingerprint == sae.fingerprint
    assert (read.name, read.base_fingerprint) == (str(tmp_path), "abc")
    assert read.link(1) == sae.link(1)
    assert torch.equal(read.encode(X).values, sae.encode(X).values)
    again = load_result(tmp_path)
    assert again.fingerprint == sae.fingerprint  # type: ignore[attr-defined]


def test_a_crosscoder_is_read_back_too(tmp_path: Path):
    codec = make_crosscoder()
    read = load_crosscoder(codec.save(tmp_path / "cross"), device="cpu")
    assert (read.fingerprint, read.name) == (codec.fingerprint, str(tmp_path / "cross"))
    assert load_crosscoder(tmp_path / "cross", dtype="float64").W_dec.dtype == torch.float64
    with pytest.raises(CodecError, match="holds a crosscoder: load it with load_crosscoder"):
        load_sae(tmp_path / "cross")
    with pytest.raises(CodecError, match="holds an autoencoder: load it with load_sae"):
        load_crosscoder(save_sae(make_sae(), tmp_path / "sae"))


def test_the_codec_of_a_training_run_is_found_in_its_folder(tmp_path: Path):
    save_sae(make_sae(), tmp_path / "results" / "codec")
    assert load_sae(tmp_path, device="cpu").fingerprint == make_sae().fingerprint


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_a_folder_of_sae_lens_is_read_without_it(tmp_path: Path, architecture: str):
    k = {"k": 9} if architecture == "topk" else {}
    folder = write_sae_lens(tmp_path, architecture=architecture, **k)
    assert load_sae(folder, device="cpu").fingerprint == make_sae(architecture).fingerprint


def test_what_older_versions_wrote_means_what_it_meant(tmp_path: Path):
    old = {
        "hook_point": "blocks.3.hook_resid_post",
        "hook_point_layer": 3,
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 9},
        "normalize_activations": False,
        "metadata": {},
        "lr": 0.1,
    }
    folder = write_sae_lens(tmp_path / "old", **old)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] = {}
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(96)}, folder / "sae_weights.safetensors")
    assert load_sae(folder, device="cpu").fingerprint == make_sae("topk").fingerprint
    save_file(
        weights | {"scaling_factor": torch.full((96,), 2.0)}, folder / "sae_weights.safetensors"
    )
    with pytest.raises(CodecError, match="scaling_factor: scaled codes are not supported"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("slice_", "positions"),
    [
        (None, "all"),
        ([None], "all"),
        ([8], "all[:8]"),
        ([8, None], "all[8:]"),
        ([2, 9, 3], "all[2:9]"),
    ],
)
def test_positions_are_those_of_the_training(tmp_path: Path, slice_: Any, positions: str):
    folder = write_sae_lens(tmp_path, metadata={"seqpos_slice": slice_})
    assert load_sae(folder, device="cpu").positions == positions


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "temporal"}, "'temporal' is not supported; supported are standard"),
        ({"architecture": ["topk"]}, "architecture: .* is not supported"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: 'tanh-relu' of a standard"),
        ({"architecture": "topk"}, "k: got None"),
        ({"architecture": "topk", "k": 9.5}, "k: got 9.5"),
        ({"normalize_activations": "batch"}, "'batch' is not supported; supported are none"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"normalize_activations": True}, "rows are scaled by a number"),
        ({"reshape_activations": "heads"}, "reshape_activations: 'heads'"),
        ({"reshape_activations": "hook_z"}, "hook_z at resid_post.3, which has no heads"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input: got 1"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"hook_layer": 4}, "hook_layer: 4, but hook_name is 'blocks.3"),
        ({"d_in": 2**40}, "d_in: got 1099511627776"),
        ({"d_sae": True}, "d_sae: got True"),
        ({"d_sae": 95}, r"W_enc has shape \(12, 96\), expected \(12, 95\)"),
        (
            {"metadata": {"hook_name": "blocks.3.hook_resid_pots"}},
            "nearest: blocks.3.hook_resid_post",
        ),
        ({"metadata": {"hook_name": None}}, "hook_name: got None"),
        ({"metadata": {"hook_name_out": "blocks.3.hook_mlp_out"}}, "transcoder"),
        ({"metadata": {"hook_head_index": 2}}, "hook_head_index: 2"),
        ({"metadata": {"seqpos_slice": "8"}}, "seqpos_slice: got '8'"),
        ({"metadata": {"model_name": 3}}, "model_name: got 3"),
        (
            {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
            "center_writing_weights: this was trained on a model whose weights were processed",
        ),
    ],
)
def test_what_a_configuration_says_is_honoured_or_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
):
    weights = make_sae()
    folder = write_sae_lens(tmp_path)
    metadata = CONFIG["metadata"] | changes.get("metadata", {})
    (folder / "cfg.json").write_text(json.dumps(CONFIG | changes | {"metadata": metadata}))
    assert weights.d_sae == 96
    with pytest.raises(CodecError, match=said) as raised:
        load_sae(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("b_enc"), r"\['b_enc'\] are missing of a standard"),
        (lambda w: w.update(log_threshold=torch.zeros(96)), r"\['log_threshold'\] have no place"),
        (lambda w: w.update(W_enc=w["W_dec"].clone()), r"W_enc has shape \(96, 12\)"),
        (lambda w: w["b_enc"].fill_(torch.nan), "b_enc holds NaN"),
        (lambda w: w.update(b_enc=torch.zeros(96, dtype=torch.int64)), "b_enc is torch.int64"),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(
    tmp_path: Path, change: Any, said: str
):
    file = write_sae_lens(tmp_path) / "sae_weights.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(CodecError, match=said):
        load_sae(tmp_path)


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path):
    file = write_sae_lens(tmp_path) / "sae_weights.safetensors"
    whole = file.read_bytes()
    sizes = {"dtype": "F32", "shape": [12, 96], "data_offsets": [0, 2**50]}
    claim = json.dumps({"W_enc": sizes}).encode()
    for bytes_ in (
        whole[: len(whole) // 2],  # cut short
        struct.pack("<Q", 2**62) + whole[8:],  # a header of 4 EiB
        struct.pack("<Q", len(claim)) + claim + b"\0" * 64,  # a tensor of 1 PiB
        b"",
    ):
        file.write_bytes(bytes_)
        with pytest.raises(CodecError, match="truncated or no safetensors file"):
            load_sae(tmp_path)


def test_a_configuration_of_many_megabytes_is_not_read(tmp_path: Path):
    folder = write_sae_lens(tmp_path / "theirs")
    (folder / "cfg.json").write_text(json.dumps(CONFIG | {"note": "x" * (1 << 20)}))
    with pytest.raises(CodecError, match=r"cfg.json has .* bytes, expected at most 1048576"):
        load_sae(folder)
    own = save_sae(make_sae(), tmp_path / "own")
    (own / "result.json").write_text(" " * (1 << 20) + (own / "result.json").read_text())
    with pytest.raises(CodecError, match=r"result.json has .* bytes"):
        load_sae(own)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_link_may_not_leave_the_folder(tmp_path: Path, name: str):
    folder = write_sae_lens(tmp_path / "codec")
    outside = (folder / name).rename(tmp_path / f"outside-{name}")
    (folder / name).symlink_to(outside)
    with pytest.raises(CodecError, match=f"{name} is a link that leaves"):
        load_sae(folder)
    (folder / "inside").mkdir()
    (folder / name).unlink()
    outside.rename(folder / "inside" / name)
    (folder / name).symlink_to(folder / "inside" / name)
    load_sae(folder)


def test_a_link_of_our_own_format_may_not_leave_the_folder_either(tmp_path: Path):
    folder = save_sae(make_sae(), tmp_path / "codec")
    (file,) = folder.glob("tensors-*")
    file.rename(tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CodecError, match="is a link that leaves"):
        load_sae(folder)


def test_what_is_no_plain_file_is_refused_instead_of_waited_for(tmp_path: Path):
    import os

    folder = write_sae_lens(tmp_path)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(CodecError, match=r"sae_weights.safetensors is missing"):
        load_sae(folder)
    os.mkfifo(folder / "sae_weights.safetensors")
    with pytest.raises(CodecError, match="no plain file"):
        load_sae(folder)


def test_other_results_and_damaged_ones_are_no_codecs(tmp_path: Path):
    folder = save_sae(make_sae("jumprelu"), tmp_path)
    (file,) = folder.glob("tensors-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CodecError, match="it is damaged"):
        load_sae(folder)
    document = json.loads((folder / "result.json").read_text())
    for change, said in (
        ({"architecture": "temporal"}, "'temporal' is not supported"),
        ({"threshold": None}, "threshold is missing"),
        ({"site": {"layer": 3, "stream": "resid"}}, "'resid' is not known"),
        ({"schema": "emlens/directions/1"}, "holds a directions, expected one of sae, crosscoder"),
    ):
        file.write_bytes(whole)
        (folder / "result.json").write_text(json.dumps(document | change))
        with pytest.raises(CodecError, match=said):
            load_sae(folder)


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path):
    folder = write_sae_lens(tmp_path, normalize_activations="expected_average_only_in")
    for factor in ('"2"', "0", "-1", "true"):
        (folder / "activation_scaler.json").write_text(f'{{"scaling_factor": {factor}}}')
        with pytest.raises(CodecError, match="scaling_factor"):
            load_sae(folder)


def test_architectures_with_a_threshold_keep_their_name(tmp_path: Path):
    for architecture in WITH_THRESHOLD:
        folder = write_sae_lens(tmp_path / architecture, architecture=architecture)
        assert load_sae(folder, device="cpu").architecture == architecture
