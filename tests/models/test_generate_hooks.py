"""Hooks and adapters during generation act on the tokens and rows they mean."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emlens.data import Positions
from emlens.models import products
from emlens.models.adapter_files import load_adapter
from emlens.models.attach import acts_on_rows, adapter_on_rows, attach_adapter
from emlens.models.generate import Sampling, generate_tokens
from emlens.models.loading import load_base
from emlens.models.merge import merge_adapter
from emlens.models.tokens_in_flight import select_positions, tokens_in_flight
from emlens.models.views import lay_views
from emlens.numerics.validation import WidthError
from tests.models.adapters import make_peft
from tests.models.prompts import (
    LENGTHS,
    continue_equal,
    greedy,
    keys_of,
    pad_prompts,
    record_logits,
    stack,
)
from tests.models.tiny import make_ids, make_tiny


def test_hooks_are_told_the_place_of_every_token_in_its_rows_text():
    model: Any = lay_views(make_tiny("llama"), None)
    ids, mask = pad_prompts((9, 4, 7, 1, 4, 4, 9, 2))
    run = [30 + row for row in range(8)]
    seen: dict[tuple[int, int], int] = {}

    def note(_module: Any, args: Any, _out: Tensor) -> None:
        tokens = tokens_in_flight(model)
        assert tokens is not None
        assert tokens.open_ended
        for row, places, given in zip(tokens.rows, tokens.absolute, args[0], strict=True):
            for place, token in zip(places.tolist(), given.tolist(), strict=True):
                if place >= 0:
                    assert (int(row), place) not in seen
                    seen[int(row), place] = token

    handle = model.embed.register_forward_hook(note)
    found = generate_tokens(
        model,
        ids,
        mask,
        sampling=Sampling(1, max_new_tokens=20),
        keys=keys_of(8),
        stop_ids=range(10, 30),
        rows=run,
    )
    handle.remove()
    assert tokens_in_flight(model) is None
    assert len({len(row) for row in found.ids}) > 2
    for row, (n, new) in enumerate(zip(mask.sum(1).tolist(), found.ids, strict=True)):
        text = [*ids[row, -n:].tolist(), *new[:-1].tolist()]
        assert [seen[30 + row, place] for place in range(len(text))] == text


@pytest.mark.parametrize("positions", ["prompt", "response", "response[2:4]", "last_prompt"])
def test_a_hook_at_named_positions_does_the_same_with_and_without_a_cache(positions, monkeypatch):
    model: Any = lay_views(make_tiny("llama", dtype=torch.float64), None)
    ids, mask = pad_prompts()
    span, _, cut = positions.partition("[")
    chosen = Positions(span, 2, 4) if cut else Positions(span)
    push = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def add(_module: Any, _args: Any, out: Tensor) -> Tensor:
        tokens = tokens_in_flight(model)
        assert tokens is not None
        return out + select_positions(tokens, chosen)[..., None] * push

    logits = record_logits(monkeypatch)
    handle = model.blocks[1].hook_resid_pre.register_forward_hook(add)
    found = generate_tokens(model, ids, mask, sampling=greedy(6))
    handle.remove()
    for row, n in enumerate(LENGTHS):
        bounds = {
            "prompt": (0, n),
            "response": (n, 99),
            "response[2:4]": (n + 2, n + 4),
            "last_prompt": (n - 1, n),
        }[positions]
        text = torch.cat([ids[row, -n:], found.ids[row]])[None]
        where = torch.arange(text.shape[1])
        mask_here = (where >= bounds[0]) & (where < bounds[1])

        def add_here(value: Tensor, hook: Any, mask_here: Tensor = mask_here) -> Tensor:
            return value + mask_here[None, :, None] * push

        hooks: list[Any] = [("blocks.1.hook_resid_pre", add_here)]
        whole = model.run_with_hooks(text, fwd_hooks=hooks)[0, n - 1 : -1]
        steps = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(steps, whole, rtol=0, atol=1e-9)


def test_a_hook_that_tells_rows_apart_sees_every_row_of_a_shared_prompt():
    model: Any = lay_views(make_tiny("llama", dtype=torch.float64), None)
    ids = make_ids(1, 5).repeat(3, 1)
    push = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def add(_module: Any, _args: Any, out: Tensor) -> Tensor:
        tokens = tokens_in_flight(model)
        assert tokens is not None
        if int(tokens.rows.max()) >= 3:
            raise WidthError("no such row")
        return out + push[tokens.rows][:, None]

    handle = model.blocks[1].hook_resid_pre.register_forward_hook(add)
    together = continue_equal(model, ids, 8)
    for row in range(3):
        alone = continue_equal(model, ids[:1], 8, rows=[row])
        assert torch.equal(together.ids[row], alone.ids[0])
    assert together.tokens_run == 15 + 3 * 7
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_attached_and_merged_adapters_decode_alike(name):
    peft_model = make_peft(name)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids = make_ids(2, 5)
    attached = stack(continue_equal(attach_adapter(base, adapter), ids, 10))
    merged = stack(continue_equal(merge_adapter(base, adapter), ids, 10))
    assert torch.equal(attached, merged)
    assert not torch.equal(attached, stack(continue_equal(base, ids, 10)))


def test_an_adapter_on_some_rows_stays_on_them_to_the_end():
    peft_model = make_peft("llama", dtype=torch.float64)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids, mask = pad_prompts()
    settings: Any = {"sampling": Sampling(1, max_new_tokens=20), "stop_ids": range(10, 30)}
    keys = keys_of(4)
    twice = [torch.cat([part, part]) for part in (ids, mask)]
    with adapter_on_rows(base, adapter, slice(4, 8)):
        assert acts_on_rows(base)
        both = generate_tokens(base, *twice, keys=torch.cat([keys, keys]), **settings)
    assert not acts_on_rows(base)
    assert len({len(row) for row in both.ids}) > 2
    for first, model in ((0, base), (4, merge_adapter(base, adapter))):
        alone = generate_tokens(model, ids, mask, keys=keys, **settings)
        for row in range(4):
            assert torch.equal(both.ids[first + row], alone.ids[row])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("point", ["hook_q", "hook_k", "hook_v"])
def test_queries_keys_and_values_made_together_are_told_apart(
    kind: str, point: str, monkeypatch: pytest.MonkeyPatch
):
    model: Any = lay_views(make_tiny(kind), None)
    ids, mask = pad_prompts((9, 4, 7))

    def change(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return out.flip(-1) * 2

    def run() -> list[Tensor]:
        handle = getattr(model.blocks[0].attn, point).register_forward_hook(change)
        with monkeypatch.context() as patch:
            seen = record_logits(patch)
            generate_tokens(model, ids, mask, sampling=greedy(6))
        handle.remove()
        return seen

    apart = run()
    monkeypatch.setattr(products, "LARGE", 1)
    together = run()
    assert len(together) == len(apart) == 6
    torch.testing.assert_close(torch.stack(together), torch.stack(apart), rtol=1e-5, atol=1e-5)
