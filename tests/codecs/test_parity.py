"""What sae_lens's autoencoders give, ours give: from memory and from their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emlens.codecs import CodecError, convert_sae, load_sae
from emlens.codecs.sae_lens_package import import_sae_lens
from tests.codecs.builders import draw, make_sae_lens, perturb

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
NORMALIZATIONS = ("none", "constant_norm_rescale", "layer_norm")


def compare(theirs: Any, ours: Any, x: torch.Tensor, *, within: float = 1e-5) -> None:
    """Codes and reconstructions within a share of the largest."""
    codes = theirs.encode(x)
    got = ours.encode(x)
    assert codes.count_nonzero() > 0
    assert torch.equal(got.values != 0, codes != 0)
    assert (got.values - codes).abs().max() <= within * codes.abs().max()
    made = theirs.decode(codes)
    assert (ours.decode(got) - made).abs().max() <= within * made.abs().max()
    sparse = ours.encode_sparse(x, k=ours.k or ours.d_sae)
    assert (ours.decode(sparse) - made).abs().max() <= within * made.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("subtract", [True, False])
def test_codes_and_reconstructions_are_those_of_sae_lens(
    tmp_path: Path, architecture: str, normalization: str, subtract: bool
):
    options = {"normalize_activations": normalization, "apply_b_dec_to_input": subtract}
    theirs = make_sae_lens(architecture, **options)
    x = 3 * draw(40, 12, seed=1) + 1
    compare(theirs, convert_sae(theirs), x)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path, device="cpu")
    compare(theirs, ours, x)
    assert (str(ours.site), ours.base_name) == ("resid_post.3", "org/model")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_precisions_are_computed_in_too(tmp_path: Path, architecture: str, dtype: str):
    theirs = make_sae_lens(architecture, dtype=dtype)
    ours = convert_sae(theirs)
    x = draw(40, 12, seed=1, dtype=torch.float64)
    got = ours.encode(x)
    assert got.values.dtype == getattr(torch, dtype)
    if dtype == "float64":
        compare(theirs, ours, x, within=1e-12)
        return
    # Half precision against float32 arithmetic on the same rounded weights.
    exact = convert_sae(theirs.to(torch.float32))
    wanted = exact.encode(x.bfloat16())
    assert (exact.decode(wanted) - ours.decode(got).float()).abs().mean() < 0.05 * (
        exact.decode(wanted).abs().mean()
    )
    theirs.to(torch.bfloat16).save_model(tmp_path)
    stored = load_sae(tmp_path, dtype="auto", device="cpu")
    assert torch.equal(stored.encode(x).values, got.values)


def test_codes_scaled_by_decoder_norms_are_those_of_sae_lens(tmp_path: Path):
    theirs = make_sae_lens("topk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        theirs.W_dec[4:8] *= torch.tensor([0.01, 0.1, 10, 100])[:, None]
    x = draw(60, 12, seed=2)
    compare(theirs, convert_sae(theirs), x)
    theirs.save_model(tmp_path)
    compare(theirs, load_sae(tmp_path, device="cpu"), x)


def test_a_latent_without_a_decoder_vector_adds_nothing_where_codes_are_scaled():
    theirs = make_sae_lens("topk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        theirs.W_dec[4] = 0
    ours = convert_sae(theirs)
    codes = ours.encode(draw(60, 12, seed=2))
    assert not codes.values[:, 4].any()
    assert ours.decode(codes).isfinite().all()


def test_heads_side_by_side_are_what_sae_lens_makes_of_them():
    theirs = make_sae_lens(
        "standard", reshape_activations="hook_z", hook_name="blocks.2.attn.hook_z"
    )
    ours = convert_sae(theirs)
    assert str(ours.site) == "z.2"
    heads = draw(40, 3, 4, seed=1)
    codes = theirs.encode(heads)
    assert torch.allclose(ours.encode(heads.flatten(1)).values, codes, atol=1e-5)
    made = theirs.decode(codes).flatten(1)
    assert torch.allclose(ours.decode(ours.encode(heads.flatten(1))), made, atol=1e-4)


def make_training(architecture: str, **config: Any) -> Any:
    sae_lens = import_sae_lens()
    if architecture == "MatryoshkaBatchTopK":
        config["matryoshka_widths"] = [32, 96]
    if architecture != "Gated":
        config["k"] = 9
    cls = getattr(sae_lens, f"{architecture}TrainingSAE")
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    made = cls(
        getattr(sae_lens, f"{architecture}TrainingSAEConfig")(
            d_in=12, d_sae=96, metadata=metadata, **config
        )
    )
    perturb(made)
    if "BatchTopK" in architecture:
        made.topk_threshold = torch.tensor(7.5, dtype=torch.float64)
    return made


def save_for_use(sae: Any, folder: Path) -> Any:
    """What sae_lens makes of an autoencoder that was trained, read back by itself."""
    sae.save_inference_model(folder)
    return import_sae_lens().SAE.load_from_disk(folder)


@pytest.mark.parametrize("architecture", ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "Gated"])
def test_one_that_trains_is_converted_as_sae_lens_saves_it_for_use(
    tmp_path: Path, architecture: str
):
    training = make_training(architecture)
    x = draw(60, 12, seed=2)
    compare(save_for_use(training, tmp_path), convert_sae(training), x)


@pytest.mark.parametrize("architecture", ["TopK", "BatchTopK"])
def test_a_checkpoint_of_scaled_rows_is_read_as_sae_lens_would_fold_it(
    tmp_path: Path, architecture: str
):
    training = make_training(architecture, normalize_activations="expected_average_only_in")
    training.save_model(tmp_path / "checkpoint")
    scaler = tmp_path / "checkpoint" / "activation_scaler.json"
    with pytest.raises(CodecError, match="scaling_factor: got None, but rows are scaled"):
        load_sae(tmp_path / "checkpoint")
    scaler.write_text(json.dumps({"scaling_factor": 0.25, "has_whitening": False}))
    read = load_sae(tmp_path / "checkpoint", device="cpu")
    with pytest.raises(CodecError, match="rows are scaled"):
        convert_sae(training)
    converted = convert_sae(training, scaling_factor=0.25)
    assert training.cfg.normalize_activations == "expected_average_only_in"  # left as it was
    training.fold_activation_norm_scaling_factor(0.25)
    wanted = save_for_use(training, tmp_path / "for_use")
    x = 4 * draw(60, 12, seed=2)
    compare(wanted, converted, x)
    compare(wanted, read, x)


def test_what_is_done_to_the_original_does_not_reach_the_copy():
    theirs = make_sae_lens("standard")
    ours = convert_sae(theirs)
    before = ours.fingerprint, ours.encode(draw(5, 12, seed=1)).values
    with torch.no_grad():
        theirs.W_enc.zero_()
    assert torch.equal(ours.encode(draw(5, 12, seed=1)).values, before[1])
    assert not any(weight.requires_grad for weight in (ours.W_enc, ours.W_dec, ours.b_enc))


def test_architectures_beyond_the_list_are_refused_by_name():
    sae_lens = import_sae_lens()
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_post")
    sizes = {"d_in": 12, "d_sae": 96, "metadata": metadata}
    absolute = sae_lens.AbsTopKSAE(sae_lens.AbsTopKSAEConfig(k=3, **sizes))
    with pytest.raises(CodecError, match="'abstopk' is not supported; supported are standard, "):
        convert_sae(absolute)
    whitened = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(normalize_activations="covariance_whitening", **sizes)
    )
    with pytest.raises(CodecError, match="covariance_whitening is not in these weights"):
        convert_sae(whitened)
    with pytest.raises(CodecError, match="got a Linear, expected a sae_lens SAE"):
        convert_sae(torch.nn.Linear(2, 2))
    with pytest.raises(CodecError, match="rows are not scaled"):
        convert_sae(make_sae_lens("standard"), scaling_factor=2.0)
