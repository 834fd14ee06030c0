"""The Hugging Face forward pass is the oracle of ours, for every supported architecture."""

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from emlens.models.views import lay_views
from tests.models.tiny import PLAIN, TINY, make_ids, make_tiny


class Float64Throughout(TorchFunctionMode):
    """Maps hard-coded ``.float()`` and ``.to(float32)`` to float64 while it lasts."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **kwargs)


def hf_logits(hf, ids, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return hf(ids, attention_mask=mask, position_ids=positions).logits


def padded(n_real=(12, 7, 9)):
    ids = make_ids(len(n_real), max(n_real))
    mask = torch.zeros_like(ids)
    for row, n in enumerate(n_real):
        mask[row, -n:] = 1
    return ids, mask


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_hugging_face_in_float32(name):
    hf = make_tiny(name)
    ids = make_ids(2, 20)
    expected = hf(ids).logits
    got = lay_views(hf, None)(ids)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_hugging_face_in_float64(name):
    with Float64Throughout():
        hf = make_tiny(name, dtype=torch.float64)
        ids = make_ids(2, 20)
        expected = hf(ids).logits
        got = lay_views(hf, None)(ids)
    assert (got - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_left_padded_logits_equal_hugging_face(name):
    hf = make_tiny(name)
    ids, mask = padded()
    expected = hf_logits(hf, ids, mask)
    got = lay_views(hf, None)(ids, attention_mask=mask)
    difference = (got - expected)[mask.bool()].abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", PLAIN)
def test_bfloat16_stays_as_near_float32_as_hugging_face_does(name):
    exact = make_tiny(name)(make_ids(2, 20)).logits
    hf = make_tiny(name, dtype=torch.bfloat16)
    theirs = (hf(make_ids(2, 20)).logits.float() - exact).abs().max()
    ours = (lay_views(hf, None)(make_ids(2, 20)).float() - exact).abs().max()
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("name", PLAIN)
def test_hooking_scores_changes_no_logit(name):
    model = lay_views(make_tiny(name), None)
    ids, mask = padded()
    plain = model(ids, attention_mask=mask)
    watch: list[Any] = [
        (f"blocks.{layer}.attn.hook_pattern", lambda x, hook: x) for layer in range(3)
    ]
    watched = model.run_with_hooks(ids, attention_mask=mask, fwd_hooks=watch)
    difference = (plain - watched)[mask.bool()].abs().max()
    assert difference <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("norm", ["ln1.hook_normalized", "ln1.hook_scale", "ln1"])
def test_listening_at_the_first_norm_changes_no_logit(name, norm):
    model: Any = lay_views(make_tiny(name), None)
    ids = make_ids(2, 20)
    plain = model(ids)
    for block in model.blocks:
        block.get_submodule(norm).register_forward_hook(lambda *_: None)
    assert (model(ids) - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("name", PLAIN)
def test_hooking_a_pattern_takes_effect(name):
    model = lay_views(make_tiny(name), None)
    ids = make_ids(1, 9)
    blank: list[Any] = [("blocks.1.attn.hook_pattern", lambda x, hook: torch.zeros_like(x))]
    assert not torch.allclose(model(ids), model.run_with_hooks(ids, fwd_hooks=blank))
