"""Latent scaling: numpy's least squares, any batching, and planted latents of one model alone."""

import numpy as np
import pytest
import torch

from emlens.codecs.latent_scaling import LatentScalingAccumulator
from emlens.numerics.validation import EmptyAccumulatorError, NonFiniteError, WidthError
from tests.codecs.planted import draw_dictionary

N, D_IN, D_SAE = 60, 5, 4
NAMES = {"codec": "drawn", "codec_fingerprint": "f", "site": "resid_post.1"}


def draw(seed=0):
    """Decoders, activations, sparse codes, and reconstructions that are not those of the codes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    codes = random(N, D_SAE).relu()
    return random(2, D_SAE, D_IN), random(2, N, D_IN), codes, random(2, N, D_IN)


def measure(decoders, x, codes, reconstruction):
    found = LatentScalingAccumulator(decoders)
    found.update(x, codes, reconstruction)
    return found.result(**NAMES)


def fit_beta(y, codes, vector):
    """Least squares of rows on codes times a vector, by numpy."""
    design = np.outer(codes, vector).reshape(-1, 1)
    return np.linalg.lstsq(design, y.reshape(-1), rcond=None)[0][0]


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 200.0)])
def test_in_half_precision_sums_are_those_of_the_same_numbers_in_float64(dtype, size):
    parts = [(size * part).to(dtype) for part in draw()]
    found, expected = measure(*parts), measure(*(part.double() for part in parts))
    torch.testing.assert_close(found.beta_error, expected.beta_error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.beta_reconstruction, expected.beta_reconstruction, rtol=1e-4, atol=1e-5
    )


def test_beta_is_least_squares():
    decoders, x, codes, reconstruction = draw()
    found = measure(decoders, x, codes, reconstruction)
    for vector in (0, 1):
        for model in (0, 1):
            for j in range(D_SAE):
                f, d = codes[:, j].numpy(), decoders[vector, j].numpy()
                own = np.outer(f, decoders[model, j].numpy())
                left = (x - reconstruction)[model].numpy() + own
                said = reconstruction[model].numpy()
                assert found.beta_error[vector, model, j] == pytest.approx(fit_beta(left, f, d))
                assert found.beta_reconstruction[vector, model, j] == pytest.approx(
                    fit_beta(said, f, d)
                )
    ratio = found.beta_error[1, 0] / found.beta_error[1, 1]
    defined = found.beta_error[1, 1] > 0
    assert torch.allclose(found.nu_error[1][defined], ratio[defined])
    assert found.nu_error[1][~defined].isnan().all()
    ratio = found.beta_reconstruction[0, 1] / found.beta_reconstruction[0, 0]
    defined = found.beta_reconstruction[0, 0] > 0
    assert torch.allclose(found.nu_reconstruction[0][defined], ratio[defined])


def test_any_batching_gives_the_same():
    decoders, x, codes, reconstruction = draw()
    whole = measure(decoders, x, codes, reconstruction)
    parts = [LatentScalingAccumulator(decoders), LatentScalingAccumulator(decoders)]
    for k, rows in enumerate(torch.arange(N).split(17)):
        parts[k % 2].update(x[:, rows], codes[rows], reconstruction[:, rows])
    parts[0].merge(parts[1])
    found = parts[0].result(**NAMES)
    for name in ("beta_error", "beta_reconstruction", "nu_error"):
        assert torch.allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-10, equal_nan=True
        )
    assert found.n_active.tolist() == (codes > 0).sum(0).tolist()
    assert found.n_rows == N


def test_latents_of_one_model_alone_are_told_from_shared_ones():
    # Both models are said perfectly: without its own contribution each error would give 0 / 0.
    vectors = draw_dictionary(6, 30).double()
    scales = torch.tensor([[1, 1, 0.6, 0, 0, 1], [1, 0.7, 1, 1, 1, 0.0]], dtype=torch.float64)
    codes = torch.rand(2000, 6, generator=torch.Generator().manual_seed(2)).double()
    codes = torch.where(codes < 0.2, codes, 0)
    decoders = scales[:, :, None] * vectors
    x = torch.einsum("ns,msd->mnd", codes, decoders)
    found = measure(decoders, x, codes, x)
    assert found.latents("tuned_only").tolist() == [3, 4]
    assert found.latents("base_only").tolist() == [5]
    assert found.latents("shared").tolist() == [0, 1, 2]
    assert found.rows()[2] == {"kind": "tuned_only", "latents": 2}
    assert torch.allclose(found.nu_error[1, :3], scales[0, :3] / scales[1, :3])
    # A latent that the crosscoder leaves out of the base although the base has it.
    left_out = decoders.clone()
    left_out[0, 0] = 0
    said = torch.einsum("ns,msd->mnd", codes, left_out)
    judged = measure(left_out, x, codes, said)
    assert 0 in judged.latents("shared").tolist()
    assert judged.decoder_norm[0, 0] == 0


def test_a_latent_of_which_nothing_is_known_is_undetermined():
    decoders, x, codes, reconstruction = draw()
    codes[:, 1] = 0
    decoders[:, 2] = 0
    found = measure(decoders, x, codes, reconstruction)
    assert {1, 2} <= set(found.latents("undetermined").tolist())
    for j in (1, 2):
        assert found.beta_error[:, :, j].isnan().all()
        assert found.beta_reconstruction[:, :, j].isnan().all()
        assert found.nu_error[:, j].isnan().all()
    kinds = ("shared", "base_only", "tuned_only", "undetermined")
    every = torch.cat([found.latents(kind) for kind in kinds])
    assert sorted(every.tolist()) == list(range(D_SAE))


def test_what_does_not_fit_changes_nothing():
    decoders, x, codes, reconstruction = draw()
    found = LatentScalingAccumulator(decoders)
    with pytest.raises(EmptyAccumulatorError, match="no token"):
        found.result(**NAMES)
    found.update(x, codes, reconstruction)
    before = found.result(**NAMES)
    with pytest.raises(NonFiniteError):
        found.update(x * torch.nan, codes, reconstruction)
    with pytest.raises(WidthError, match=r"codes \(60, 3\).*expected \[2, n, 5\], \[n, 4\]"):
        found.update(x, codes[:, :3], reconstruction)
    with pytest.raises(WidthError, match=r"shape \(3, 4, 5\), expected \[2, d_sae, d_in\]"):
        LatentScalingAccumulator(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="other decoders"):
        found.merge(LatentScalingAccumulator(decoders + 1))
    assert torch.equal(found.result(**NAMES).beta_error, before.beta_error)
