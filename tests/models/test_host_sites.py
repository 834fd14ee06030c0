"""Activations of a Hugging Face model in training: those of its hooked twin, with gradients."""

from typing import Any

import pytest
import torch

from emlens.models import attach_adapter, load_adapter
from emlens.models.host_sites import STREAMS, check_host_site, read_host_site
from emlens.models.views import lay_views
from emlens.sites import Site, SiteError, parse_site
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny


@pytest.mark.parametrize("name", PLAIN)
def test_activations_are_those_of_the_hooked_twin(name):
    peft_model = make_peft(name)
    twin: Any = attach_adapter(lay_views(make_tiny(name), None), load_adapter(peft_model))
    ids = make_ids(2, 9)
    with torch.no_grad():
        _, cache = twin.run_with_cache(ids)
    for layer in (0, 2):
        for stream in STREAMS:
            site = Site(layer, stream)
            found = read_host_site(peft_model, site, {"input_ids": ids})
            expected = cache[site.hook_name]
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_gradients_reach_the_adapter_below_and_nothing_above_is_run():
    model: Any = make_peft("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ran = []
    model.base_model.model.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(2))
    read_host_site(
        model, parse_site("resid_post.1"), {"input_ids": make_ids(1, 5)}
    ).sum().backward()
    assert ran == []
    reached = {n.split(".layers.")[1][0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"0", "1"}
    assert not model.base_model.model.model.layers[1]._forward_hooks


def test_what_cannot_be_read_is_named():
    model = make_tiny("llama")
    with pytest.raises(SiteError, match=r"resid_mid.1 cannot be read .* one of resid_pre"):
        check_host_site(model, parse_site("resid_mid.1"), width=24)
    with pytest.raises(SiteError, match=r"no resid_post.3, its blocks are 0 to 2"):
        check_host_site(model, parse_site("resid_post.3"), width=24)
    with pytest.raises(SiteError, match="is 24 wide, and 20 was expected"):
        check_host_site(model, parse_site("resid_post.1"), width=20)
    with pytest.raises(TypeError, match="a Linear holds no Hugging Face model"):
        check_host_site(torch.nn.Linear(2, 2), parse_site("resid_post.1"), width=2)
