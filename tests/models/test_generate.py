"""Greedy decoding over our cache, with Hugging Face's generate and uncached logits as judges."""

from typing import Any

import pytest
import torch

from emlens.models.adapter_files import load_adapter
from emlens.models.attach import attach_adapter
from emlens.models.generate import generate_greedy
from emlens.models.loading import load_base
from emlens.models.merge import merge_adapter
from emlens.models.views import lay_views
from tests.models.adapters import make_peft
from tests.models.tiny import PLAIN, make_ids, make_tiny, make_tokenizer


@pytest.mark.parametrize("name", PLAIN)
def test_tokens_equal_hugging_faces_greedy_generate(name):
    hf: Any = make_tiny(name)
    ids = make_ids(3, 7)
    hf.generation_config.eos_token_id = None
    expected = hf.generate(ids, max_new_tokens=12, do_sample=False)[:, 7:]
    assert torch.equal(generate_greedy(lay_views(hf, None), ids, max_new_tokens=12), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_cached_steps_give_the_logits_of_one_pass(name):
    model = lay_views(make_tiny(name), None)
    prompt = make_ids(2, 6)
    new = generate_greedy(model, prompt, max_new_tokens=8)
    whole = model(torch.cat([prompt, new], dim=1))
    assert torch.equal(whole[:, 5:-1].argmax(-1), new)


def test_a_row_repeats_its_stop_token_once_it_has_ended():
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(4, 5)
    free = generate_greedy(model, ids, max_new_tokens=10)
    stop = int(free[0, 3])
    stopped = generate_greedy(model, ids, max_new_tokens=10, stop_ids=[stop])
    for row, plain in zip(stopped, free, strict=True):
        ends = (plain == stop).nonzero()
        end = int(ends[0]) if len(ends) else 10
        assert torch.equal(row[: end + 1], plain[: end + 1][: len(row)])
        assert (row[end:] == stop).all()


def test_all_rows_ended_stops_early():
    model = lay_views(make_tiny("llama"), None)
    ids = make_ids(1, 5)
    first = int(generate_greedy(model, ids, max_new_tokens=1)[0, 0])
    assert generate_greedy(model, ids, max_new_tokens=10, stop_ids=[first]).shape == (1, 1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "neox"])
def test_attached_and_merged_adapters_decode_alike(name):
    peft_model = make_peft(name)
    base, adapter = load_base(peft_model), load_adapter(peft_model)
    ids = make_ids(2, 5)
    attached = generate_greedy(attach_adapter(base, adapter), ids, max_new_tokens=10)
    merged = generate_greedy(merge_adapter(base, adapter), ids, max_new_tokens=10)
    assert torch.equal(attached, merged)
    assert not torch.equal(attached, generate_greedy(base, ids, max_new_tokens=10))


def test_the_hosts_own_generate_works_and_agrees():
    model = lay_views(make_tiny("qwen2"), make_tokenizer())
    ids = make_ids(1, 6)
    theirs: Any = model.generate(
        ids, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False
    )
    assert torch.equal(theirs[:, 6:], generate_greedy(model, ids, max_new_tokens=8))


def test_a_prompt_without_room_is_named():
    model = lay_views(make_tiny("llama"), None)
    with pytest.raises(ValueError, match="context of 64"):
        generate_greedy(model, make_ids(1, 60), max_new_tokens=5)
    with pytest.raises(ValueError, match="nothing to do"):
        generate_greedy(model, make_ids(1, 4)[:, :0], max_new_tokens=5)
