"""Float64 passes block by block: against the whole model in float64, and nothing left behind."""

import copy

import pytest
import torch

from emlens.interventions import Ablate, Intervention, intervene
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.exact import exact_logits, share_exact
from emlens.models.loading import load_base
from emlens.models.views import lay_views
from tests.interventions.vectors import close, draw
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_half_precision_gives_the_logits_of_its_weights_in_float64(name, dtype):
    hf, ids = make_tiny(name, dtype=dtype), make_ids(2, 12)
    model, wide = lay_views(hf, None), lay_views(copy.deepcopy(hf).double(), None)
    before = model(ids)
    # Gemma's norms hold 1 + w, rounded to float32.
    limit = 1e-6 if name.startswith("gemma") else 1e-12
    acting = [Intervention("resid_pre.1", Ablate(draw(model.cfg.d_model)))]
    shell = share_exact(model)
    got = exact_logits(shell, ids)
    assert got.dtype == torch.float64
    assert close(got, wide(ids), limit)
    with intervene(shell, acting), intervene(wide, acting):
        assert close(exact_logits(shell, ids), wide(ids), limit)
    assert torch.equal(model(ids), before)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in shell.parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_an_attached_adapter_is_part_of_it(name):
    peft_model = make_peft(name)
    model = attach_adapter(load_base(peft_model), load_adapter(peft_model))
    wide = make_peft(name, dtype=torch.float64)
    ids = make_ids(2, 12)
    expected = attach_adapter(load_base(wide), load_adapter(wide))(ids)
    assert close(exact_logits(share_exact(model), ids), expected, 1e-6)
    assert not close(exact_logits(share_exact(load_base(peft_model)), ids), expected, 1e-3)


def test_a_failure_leaves_the_weights_as_they_were():
    model = lay_views(make_tiny("llama"), None)
    shell, before = share_exact(model), model(make_ids(1, 4))
    with pytest.raises(IndexError):
        exact_logits(shell, torch.full((1, 4), 10_000))
    assert {p.dtype for p in shell.parameters()} == {torch.float32}
    assert torch.equal(model(make_ids(1, 4)), before)
    with pytest.raises(ValueError, match="share_exact"):
        exact_logits(model, make_ids(1, 4))
