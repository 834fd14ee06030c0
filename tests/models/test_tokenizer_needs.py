"""Text in, padded on either side, through tokenizers that name no pad or beginning, or none."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from emlens.activations.reading import plan_reading
from emlens.data import Batching
from emlens.models.export import save_checkpoint
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import lay_views, share_model
from tests.models.prompts import continue_equal, stack
from tests.models.tiny import make_ids, make_tiny, make_tokenizer

MISSING = [("pad_token", "bos_token"), ("pad_token",), ()]


def bare(*missing: str) -> Any:
    tokenizer = make_tokenizer()
    for name in missing:
        setattr(tokenizer, name, None)
    return tokenizer


def load(name: str, *missing: str) -> Any:
    return lay_views(make_tiny(name), bare(*missing))


def near(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_text_reads_as_its_ids(name, missing):
    model, ids = load(name, *missing), torch.tensor([[5, 6, 7]])
    assert torch.equal(model.to_tokens("w5 w6 w7"), ids)
    logits, cache = model.run_with_cache("w5 w6 w7")
    expected = model(ids)
    assert near(model("w5 w6 w7"), expected)
    assert near(logits, expected)
    assert cache["resid_post", 0].shape == (1, 3, model.cfg.d_model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_text_padded_on_either_side_reads_as_it_does_alone(name, missing, side):
    model = load(name, *missing)
    together = model(["w5 w6 w7 w8 w9", "w9 w10"], padding_side=side)
    alone = model("w9 w10")
    assert near(together[1, -2:] if side == "left" else together[1, :2], alone[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ids_under_a_tokenizer_that_pads_on_the_left_run_without_a_mask(name):
    model, ids = load(name, "pad_token", "bos_token"), make_ids(2, 6)
    expected = model(ids)
    model.tokenizer.padding_side = "left"
    assert near(model(ids), expected)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_hosts_generate_goes_on_as_ours_does(name, missing):
    model, ids = load(name, *missing), make_ids(2, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    expected = stack(continue_equal(model, ids, 5))
    assert torch.equal(model.generate(ids, **settings)[:, 6:], expected)
    texts = [" ".join(f"w{token}" for token in row) for row in ids.tolist()]
    texts[1] = texts[1].split(" ", 2)[2]
    found = model.generate(texts, return_type="tokens", **settings)
    assert torch.equal(found[0, 6:], expected[0])
    alone = stack(continue_equal(model, ids[1:, 2:], 5))
    assert torch.equal(found[1, 6:], alone[0])


@pytest.mark.parametrize("missing", MISSING[:2])
def test_the_given_tokenizer_stays_as_it_was(missing):
    tokenizer = bare(*missing)
    before, named = fingerprint_tokenizer(tokenizer), dict(tokenizer.special_tokens_map)
    model: Any = lay_views(make_tiny("llama"), tokenizer)
    model(["w5 w6", "w7"])
    assert tokenizer.special_tokens_map == named
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(model.tokenizer) == before
    assert model.tokenizer.pad_token_id == tokenizer.eos_token_id
    assert not model.cfg.default_prepend_bos
    assert share_model(model).tokenizer is model.tokenizer


def test_a_tokenizer_that_lacks_nothing_is_used_itself():
    tokenizer = make_tokenizer()
    assert lay_views(make_tiny("llama"), tokenizer).tokenizer is tokenizer


def test_a_token_that_the_template_names_is_not_filled_in():
    tokenizer = bare("pad_token", "bos_token")
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    model: Any = lay_views(make_tiny("llama"), tokenizer)
    chat = [{"role": "user", "content": "w5"}]
    texts = [one.apply_chat_template(chat, tokenize=False) for one in (tokenizer, model.tokenizer)]
    assert texts[0] == texts[1]
    assert model.tokenizer.pad_token == tokenizer.eos_token


def test_what_was_filled_in_is_not_written_and_what_was_chosen_is(tmp_path):
    model = load("llama", "pad_token", "bos_token")
    model(["w5 w6", "w7"])
    save_checkpoint(model, tmp_path / "plain")
    plain = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert set(plain.special_tokens_map) == {"eos_token"}
    model.tokenizer.pad_token = "w9"
    save_checkpoint(model, tmp_path / "chosen")
    chosen = AutoTokenizer.from_pretrained(tmp_path / "chosen")
    assert chosen.special_tokens_map == {"eos_token": "<end>", "pad_token": "w9"}


def test_a_missing_tokenizer_is_named_with_a_way_out_that_works():
    model: Any = lay_views(make_tiny("llama"), None)
    chats = ["w5 w6"]
    with pytest.raises(ValueError, match=r"^local has no tokenizer.*Set .*model\.tokenizer = "):
        plan_reading(model, chats, sites="resid_post.1", positions="all", batching=Batching())
    model.tokenizer = make_tokenizer()
    plan_reading(model, chats, sites="resid_post.1", positions="all", batching=Batching())
