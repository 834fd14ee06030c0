"""Explained variance from sums against the rows themselves, and codecs that fit one model less."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from emlens.features.accumulate import ChangeSums, PromptAccumulator, PromptSums
from emlens.features.encode import EncodedRows
from emlens.features.health import capture_share, compare_explained, explain_variance
from tests.codecs.builders import draw
from tests.features.comparisons import make_diff

WIDE = torch.float64


def count(x: torch.Tensor, rebuilt: torch.Tensor, prompts: torch.Tensor) -> PromptSums:
    """Sums of rows whose reconstructions are given, and that have no codes."""
    nothing = torch.zeros(0, dtype=torch.long)
    codes = EncodedRows(
        n_rows=len(x),
        d_sae=4,
        rows=nothing,
        latents=nothing,
        values=torch.zeros(0, dtype=WIDE),
        reconstruction=rebuilt,
    )
    own = PromptAccumulator(int(prompts.max()) + 1, d_in=x.shape[1], d_sae=4)
    own.update(prompts, x, codes)
    return own.result()


def explained(x: np.ndarray, rebuilt: np.ndarray) -> float:
    return 1 - ((x - rebuilt) ** 2).sum() / (((x - x.mean(0)) ** 2).sum())


def make_case(noise: tuple[float, float], *, n: int = 30, seed: int = 0):
    """Base and tuned rows [2 n 6] with a mean far from 0, and what a codec makes of them."""
    x = 50 + draw(2, n, 6, seed=seed, dtype=WIDE)
    scale = torch.tensor(noise, dtype=WIDE)[:, None, None]
    return x, x + scale * draw(2, n, 6, seed=seed + 1, dtype=WIDE)


def test_explained_variance_is_about_the_mean():
    x, rebuilt = make_case((0.5, 0.5))
    found = explain_variance(count(x[0], rebuilt[0], torch.arange(30) // 5))
    assert float(found) == pytest.approx(explained(x[0].numpy(), rebuilt[0].numpy()), rel=1e-9)
    assert 0.6 < float(found) < 0.9
    alone = count(x[0][:1], rebuilt[0][:1], torch.zeros(1, dtype=torch.long))
    assert bool(explain_variance(alone).isnan())


def test_the_interval_of_the_change_leaves_each_prompt_out_of_both_in_turn():
    x, rebuilt = make_case((0.4, 0.6))
    prompts = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 5, 5, 5] * 2)
    sides = [count(x[k], rebuilt[k], prompts) for k in (0, 1)]
    found = compare_explained(*sides)
    assert found is not None

    def change(kept: np.ndarray) -> float:
        base, tuned = (explained(x[k].numpy()[kept], rebuilt[k].numpy()[kept]) for k in (0, 1))
        return tuned - base

    value = change(np.ones(30, dtype=bool))
    pseudo = [6 * value - 5 * change(prompts.numpy() != p) for p in range(6)]
    half = stats.t.ppf(0.975, 5) * stats.sem(pseudo)
    assert found.value == pytest.approx(value, rel=1e-9)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(("noise", "worse"), [((0.3, 0.7), True), ((0.5, 0.5), False)])
def test_a_codec_that_fits_the_tuned_model_less_is_noticed(noise, worse: bool):
    x, rebuilt = make_case(noise, n=80)
    prompts = torch.arange(80) // 4
    change = compare_explained(*(count(x[k], rebuilt[k], prompts) for k in (0, 1)))
    assert change is not None
    assert (change.high < 0) == worse


def test_one_prompt_says_nothing_of_others():
    x, rebuilt = make_case((0.3, 0.7))
    sums = [count(x[k], rebuilt[k], torch.zeros(30, dtype=torch.long)) for k in (0, 1)]
    assert compare_explained(*sums) is None
    lonely = [count(x[k][:2], rebuilt[k][:2], torch.arange(2)) for k in (0, 1)]
    assert compare_explained(*lonely) is None


def test_the_share_captured_is_of_the_squared_change():
    caught = ChangeSums(
        squares=torch.tensor([3.0, 5.0]).double(), missed=torch.tensor([2.0, 4.0]).double()
    )
    assert capture_share(caught) == 0.25
    nothing = ChangeSums(squares=torch.zeros(2, dtype=WIDE), missed=torch.zeros(2, dtype=WIDE))
    assert capture_share(nothing) is None


@pytest.mark.parametrize(("share", "expected"), [(0.61, False), (0.59, True), (torch.nan, True)])
def test_too_little_explained_is_underpowered(share: float, expected: bool):
    assert make_diff("a", torch.zeros(3), explained=share).health.underpowered is expected


def test_unknown_weights_and_few_prompts_are_said():
    health = make_diff("tuned", torch.zeros(3)).health
    told = replace(health, same_base=True)
    assert told.cautions == ()
    assert replace(told, n_prompts=12).cautions == ()
    assert "only 11 prompts were read" in "".join(replace(told, n_prompts=11).cautions)
    assert "is not known" in "".join(replace(told, same_base=None).cautions)
    assert "other weights" in "".join(replace(told, same_base=False).cautions)
