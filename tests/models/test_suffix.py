"""Scores under steering vectors: those of one whole pass a vector under `Add`, and refusals."""

from typing import Any

import pytest
import torch

from emlens.data import Batching
from emlens.interventions import Ablate, Add, Intervention, intervene
from emlens.models import attach_adapter, load_adapter, score_responses
from emlens.models.attach import adapter_on_rows
from emlens.models.suffix import score_steered
from emlens.models.views import lay_views
from emlens.numerics.validation import WidthError
from emlens.sites import Site, SiteError, parse_site
from tests.models.adapters import make_peft
from tests.models.test_score import make_chats
from tests.models.tiny import PLAIN, make_tiny


def tuned(name: str, dtype: torch.dtype = torch.float32) -> Any:
    base = lay_views(make_tiny(name, dtype=dtype), None)
    return attach_adapter(base, load_adapter(make_peft(name)))


def draw(model: Any, site: Site, n: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return 2 * torch.randn(n, site.width(model.cfg), generator=generator)


def one_pass_each(model: Any, site: Site, vectors: torch.Tensor, **more: Any) -> torch.Tensor:
    rows = []
    for vector in vectors:
        with intervene(model, [Intervention(site, Add(vector))]):
            rows.append([score.total for score in score_responses(model, make_chats(), **more)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", PLAIN)
def test_scores_are_those_of_whole_passes_under_the_added_vector(name):
    model = tuned(name)
    site = parse_site("resid_post.1")
    vectors = draw(model, site)
    found = score_steered(model, make_chats(), site=site, vectors=vectors)
    expected = one_pass_each(model, site, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = [score.total for score in score_responses(model, make_chats())]
    assert float((expected - torch.tensor(plain)).abs().max()) > 0.1


@pytest.mark.parametrize(
    "text",
    ["resid_post.2", "resid_pre.0", "resid_mid.1", "attn_out.1", "mlp_out.2", "post.1", "z.1"],
)
def test_every_site_of_a_block_can_be_steered_at(text):
    model, site = tuned("qwen3", torch.float64), parse_site(text)
    vectors = draw(model, site)
    found = score_steered(model, make_chats(), site=site, vectors=vectors)
    torch.testing.assert_close(found, one_pass_each(model, site, vectors), rtol=0, atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_batching_changes_nothing(tokens):
    model, site = tuned("gemma3", torch.float64), parse_site("resid_post.0")
    vectors = draw(model, site, 5)
    whole = score_steered(model, make_chats(), site=site, vectors=vectors)
    batching = Batching(tokens=tokens)
    found = score_steered(model, make_chats(), site=site, vectors=vectors, batching=batching)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-8)


def test_interventions_around_it_act_before_the_vector():
    model, site = tuned("llama", torch.float64), parse_site("resid_post.1")
    vectors = draw(model, site)
    around = [
        Intervention(site, Ablate(vectors[0]), "response"),
        Intervention("resid_pre.0", Ablate(vectors[1]), "prompt"),
        Intervention("mlp_out.2", Ablate(vectors[2]), "response[:2]"),
    ]
    with intervene(model, around):
        found = score_steered(model, make_chats(), site=site, vectors=vectors)
        expected = one_pass_each(model, site, vectors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    free = score_steered(model, make_chats(), site=site, vectors=vectors)
    assert float((free - found).abs().max()) > 1e-3


def test_blocks_below_the_site_are_run_once_a_batch():
    model, site = tuned("llama"), parse_site("resid_post.1")
    ran: list[tuple[int, int]] = []
    run = {layer: block.forward for layer, block in enumerate(model.blocks)}

    def count(layer: int):
        def forward(resid: torch.Tensor, **more: Any) -> torch.Tensor:
            ran.append((layer, len(resid)))
            return run[layer](resid, **more)

        return forward

    for layer, block in enumerate(model.blocks):
        block.forward = count(layer)
    chats = make_chats()[:2]
    width = max(len(chat.ids) for chat in chats)
    score_steered(
        model,
        chats,
        site=site,
        vectors=draw(model, site, 5),
        batching=Batching(tokens=2 * 2 * width),
    )
    assert ran == [(0, 2), (1, 2), (2, 4), (2, 4), (2, 2)]


def test_what_it_cannot_do_is_refused():
    model = tuned("llama")
    site, chats = parse_site("resid_post.1"), make_chats()
    vectors = draw(model, site)
    with pytest.raises(SiteError, match=r"embed is not in a block .* such as resid_post.1"):
        score_steered(model, chats, site=parse_site("embed"), vectors=vectors)
    with pytest.raises(SiteError, match=r"pattern.1 is not in a block with one vector"):
        score_steered(model, chats, site=parse_site("pattern.1"), vectors=vectors)
    with pytest.raises(SiteError, match=r"no resid_post.7"):
        score_steered(model, chats, site=parse_site("resid_post.7"), vectors=vectors)
    with pytest.raises(WidthError, match=r"vectors: got shape \(3, 24\), expected .*, 40\]"):
        score_steered(model, chats, site=parse_site("post.1"), vectors=vectors)
    with pytest.raises(WidthError, match=r"vectors: got shape \(0, 24\)"):
        score_steered(model, chats, site=site, vectors=vectors[:0])
    handle = model.blocks[0].hook_resid_post.register_forward_hook(lambda _m, _a, _o: None)
    with pytest.raises(ValueError, match=r"no Interventions, at blocks.0.hook_resid_post"):
        score_steered(model, chats, site=site, vectors=vectors)
    handle.remove()
    base = lay_views(make_tiny("llama"), None)
    with (
        adapter_on_rows(base, load_adapter(make_peft("llama")), slice(0, 1)),
        pytest.raises(ValueError, match="acts on some rows"),
    ):
        score_steered(base, chats, site=site, vectors=vectors)


def test_a_failure_leaves_no_hook_behind():
    model, site = tuned("llama"), parse_site("mlp_out.1")
    hooks = len(model.hook_dict[site.hook_name]._forward_hooks)
    last, model.blocks[2].forward = model.blocks[2].forward, lambda *_a, **_k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        score_steered(model, make_chats(), site=site, vectors=draw(model, site))
    model.blocks[2].forward = last
    assert len(model.hook_dict[site.hook_name]._forward_hooks) == hooks
