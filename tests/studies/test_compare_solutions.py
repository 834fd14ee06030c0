"""Two adapters of a tiny base: losses, perturbations and effects against plain passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emlens.models import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.lora import LoraAdapter, scale_adapter
from emlens.models.null import measure_adapter_norm, perturb_adapter, sample_null_adapters
from emlens.models.views import lay_views
from emlens.results import load_result
from emlens.studies import SolutionComparison, SolutionSettings, compare_solutions
from tests.activations.chats import make_chats, token_ids
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

TASK, TEXT = make_chats(4, seed=1), make_chats(3, seed=5)
SETTINGS = SolutionSettings(norms=(0.5, 1.0), epsilons=(0.0, 0.5, 1.0), seeds=2)


@pytest.fixture(scope="module")
def base() -> Any:
    return lay_views(make_tiny("llama"), make_tokenizer())


@pytest.fixture(scope="module")
def adapter() -> LoraAdapter:
    return load_adapter(make_peft("llama"))


@torch.no_grad()
def loss_by_hand(model: Any) -> float:
    parts = []
    for chat in TASK:
        ids, start, stop = token_ids(chat)
        logs = model(torch.tensor([ids]))[0, start - 1 : stop - 1].double().log_softmax(-1)
        parts.append(-logs.gather(1, torch.tensor(ids[start:stop])[:, None]))
    return float(torch.cat(parts).mean())


def test_losses_and_increases_are_those_of_plain_passes(base, adapter, tmp_path: Path):
    other = sample_null_adapters(adapter, n=1, seed=3)[0]

    def compare() -> SolutionComparison:
        return compare_solutions(
            base,
            {"general": adapter, "narrow": other},
            task=TASK,
            text=TEXT,
            settings=SETTINGS,
            out=tmp_path / "run",
        )

    found = compare()
    assert found.base_loss == pytest.approx(loss_by_hand(base), abs=1e-4)
    general = found.general
    assert general.loss == pytest.approx(loss_by_hand(attach_adapter(base, adapter)), abs=1e-4)
    norm = measure_adapter_norm(adapter)
    for wanted, loss in zip(SETTINGS.norms, general.losses, strict=True):
        scaled = scale_adapter(adapter, wanted / norm)
        assert measure_adapter_norm(scaled) == pytest.approx(wanted)
        assert loss == pytest.approx(loss_by_hand(attach_adapter(base, scaled)), abs=1e-4)
    np.testing.assert_allclose(general.loss_increase[0], 0, atol=1e-3)
    turned = perturb_adapter(adapter, epsilon=0.5, seed=1)
    expected = (loss_by_hand(attach_adapter(base, turned)) - general.loss) / (
        found.base_loss - general.loss
    )
    assert float(general.loss_increase[1, 1]) == pytest.approx(expected, rel=1e-2, abs=1e-2)
    assert found.random_kl.shape == (2, 2)
    assert min(general.kl) > 0
    assert general.kl[0] < general.kl[1]
    assert len(found.rows()) == 2
    assert torch.equal(compare().random_kl, found.random_kl)
    assert isinstance(load_result(tmp_path / "run" / "results" / "comparison"), SolutionComparison)


def test_other_names_are_refused(base, adapter, tmp_path: Path):
    with pytest.raises(ValueError, match="expected 'general' and 'narrow'"):
        compare_solutions(
            base, {"a": adapter}, task=TASK, text=TEXT, settings=SETTINGS, out=tmp_path
        )


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_a_perturbation_keeps_norms_and_sets_the_cosine(adapter: LoraAdapter, epsilon: float):
    turned = perturb_adapter(adapter, epsilon=epsilon, seed=4)
    for name, module in adapter.modules.items():
        for factor in "AB":
            x, y = (getattr(m, factor).double().flatten() for m in (module, turned.modules[name]))
            assert float(y.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
            cosine = float(x @ y / (x.norm() * y.norm()))
            assert cosine == pytest.approx((1 - epsilon**2) ** 0.5, abs=1e-5)


def test_a_perturbation_leaves_zero_alone_and_is_refused_outside_its_range(adapter: LoraAdapter):
    still = scale_adapter(adapter, 1.0)
    name, module = next(iter(still.modules.items()))
    zero = type(module)(A=module.A, B=torch.zeros_like(module.B), scale=module.scale)
    modules = {**still.modules, name: zero}
    turned = perturb_adapter(
        LoraAdapter(modules=modules, name="x", fingerprint="y"), epsilon=0.4, seed=0
    )
    assert not bool(turned.modules[name].B.any())
    with pytest.raises(ValueError, match=r"epsilon: got 1.5"):
        perturb_adapter(adapter, epsilon=1.5, seed=0)
