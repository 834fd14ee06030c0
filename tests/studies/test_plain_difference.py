"""What needs no codec, on tiny pairs whose change is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from emlens.data import parse_positions
from emlens.models.lora import LoraModule
from emlens.models.pair import load_pair
from emlens.results import load_result
from emlens.studies import measure_plain_difference
from emlens.studies.plain_difference import first_positions
from tests.activations.chats import make_chats, token_ids
from tests.features.planted import PLANTED, SITE, make_codec, make_pair
from tests.studies.personas import make_adapter, make_base

CODEC, CHATS = make_codec(), make_chats(6)


@torch.no_grad()
def changes_by_hand(pair: Any) -> np.ndarray:
    """tuned - base at every token, one chat at a time."""
    found = []
    for chat in CHATS:
        ids = torch.tensor([token_ids(chat)[0]])
        sides = [
            model.run_with_cache(ids, names_filter=SITE.hook_name)[1][SITE.hook_name][0]
            for model in (pair.base, pair.tuned)
        ]
        found.append((sides[1] - sides[0]).double().numpy())
    return np.concatenate(found)


def test_a_constant_change_lies_along_its_mean_alone():
    found = measure_plain_difference(make_pair(CODEC), CHATS, site=SITE, positions="all")
    mean, best, first = found.vectors
    assert [one.name for one in found.vectors] == [
        "mean difference",
        "best direction",
        "first 5 tokens",
    ]
    assert mean.captured == pytest.approx(1, abs=1e-6)
    assert best.captured == pytest.approx(1, abs=1e-6)
    assert first.cosine == pytest.approx(1, abs=1e-6)
    assert mean.norm == pytest.approx(2.0, rel=1e-4)
    assert found.random_share == 1 / 24
    assert (found.n_writes, found.captured_by_writes) == (0, None)


def test_shares_and_norms_are_those_of_plain_passes_and_singular_vectors(tmp_path):
    pair = load_pair(make_base(), make_adapter(CODEC, PLANTED, size=3.0))
    found = measure_plain_difference(pair, CHATS, site=SITE, positions="all")
    x = changes_by_hand(pair)
    total = (x**2).sum()
    mean = x.mean(0)
    along = x @ (mean / np.linalg.norm(mean))
    vectors = {one.name: one for one in found.vectors}
    assert vectors["mean difference"].captured == pytest.approx((along**2).sum() / total, rel=1e-3)
    singular = np.linalg.svd(x, compute_uv=False)
    assert vectors["best direction"].captured == pytest.approx(singular[0] ** 2 / total, rel=1e-3)
    write = found.vectors[-1]
    assert pair.adapter is not None
    own = pair.adapter.modules[write.name]
    assert write.norm == pytest.approx(np.linalg.svd(own.B.numpy() @ own.A.numpy())[1][0], rel=1e-4)
    assert write.leading_share == pytest.approx(1)
    # Everything that a rank-1 adapter below the site changes lies along what it writes.
    assert write.captured == pytest.approx(1, abs=1e-4)
    assert found.captured_by_writes == pytest.approx(1, abs=1e-4)
    assert (found.n_writes, found.random_writes) == (1, 1 / 24)
    assert all(one.cosine >= 0 for one in (vectors["best direction"], write))
    assert len(write.promoted) == len(write.suppressed) == 8
    assert found.rows()[0]["random"] == 1 / 24
    found.save(tmp_path)
    assert load_result(tmp_path).to_dict() == found.to_dict()


def test_a_module_above_the_site_does_not_act_on_it():
    pair = load_pair(make_base(), make_adapter(CODEC, PLANTED))
    with pytest.raises(ValueError, match=r"do not differ at resid_post.0"):
        measure_plain_difference(pair, CHATS, site="resid_post.0", positions="all")
    modules = {}
    for layer in range(3):
        (own,) = make_adapter(CODEC, layer).modules.values()
        modules[f"model.layers.{layer}.mlp.down_proj"] = own
    everywhere = replace(make_adapter(CODEC, 0), modules=modules)
    pair = load_pair(make_base(), everywhere)
    for site, n in (("resid_pre.1", 1), ("resid_mid.1", 1), ("resid_post.1", 2)):
        found = measure_plain_difference(pair, CHATS, site=site, positions="all")
        assert len([one for one in found.vectors if one.name in modules]) == 3
        assert found.n_writes == n, site


@pytest.mark.parametrize(
    ("module", "n_at"),
    [
        ("self_attn.o_proj", {"resid_mid": 1, "attn_out": 1, "mlp_out": 0, "resid_post": 1}),
        ("mlp.down_proj", {"mlp_out": 1, "resid_post": 1}),
    ],
)
def test_a_module_acts_where_its_own_output_is(module: str, n_at: dict[str, int]):
    """A rank-1 change of one module, all of it along what that module writes."""
    base = make_base()
    width = base.cfg.d_mlp if "mlp" in module else base.cfg.n_heads * base.cfg.d_head
    A = torch.randn(1, width, generator=torch.Generator().manual_seed(3))
    lora = LoraModule(A=A, B=3 * CODEC.W_dec[PLANTED][:, None], scale=1.0)
    adapter = replace(make_adapter(CODEC, 0), modules={f"model.layers.1.{module}": lora})
    pair = load_pair(base, adapter)
    for stream, n in n_at.items():
        found = measure_plain_difference(pair, CHATS, site=f"{stream}.1", positions="all")
        assert found.n_writes == n, stream
        if stream not in ("resid_post", "mlp_out") or "mlp" in module:
            assert found.captured_by_writes == pytest.approx(1, abs=1e-4), stream
    # Above, the outputs of other modules change with what they read, and hold none of this one.
    found = measure_plain_difference(pair, CHATS, site="attn_out.2", positions="all")
    assert (found.n_writes, found.captured_by_writes) == (0, None)


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ("all", "all[:5]"),
        ("all[8:]", "all[8:13]"),
        ("response[2:4]", "response[2:4]"),
        ("response[-9:]", "response[-9:-4]"),
        ("response[-3:]", "response[-3:]"),
        ("all[3:-1]", "all[3:8]"),
    ],
)
def test_the_first_tokens_are_the_first_of_those_counted(given, first):
    assert str(first_positions(parse_positions(given))) == first
