"""What is taken from a model in memory, what is asked of it, and what is computed only once."""

from typing import Any

import huggingface_hub
import pytest
import torch

from emlens.models import checkpoints, views
from emlens.models.adapter_files import load_adapter
from emlens.models.loading import check_place, load_base
from emlens.models.pair import load_pair
from emlens.models.tokenizer_hash import fingerprint_tokenizer
from emlens.models.views import lay_views, origin_of
from tests.models.adapters import make_peft
from tests.models.tiny import make_tiny, make_tokenizer

COMMIT = "c" * 40


def test_weights_are_fingerprinted_once(tmp_path, monkeypatch):
    make_tiny("llama").save_pretrained(tmp_path)
    counted = []
    plain = checkpoints.fingerprint_weights

    def count(model: Any) -> str:
        counted.append(model)
        return plain(model)

    for module in (checkpoints, views):
        monkeypatch.setattr(module, "fingerprint_weights", count)
    found = origin_of(load_base(tmp_path)).fingerprint
    assert len(counted) == 1
    assert found == plain(make_tiny("llama"))
    assert origin_of(load_base(make_tiny("llama"))).fingerprint == found
    assert len(counted) == 2


def cached(cache, name, *, branch="main"):
    """A repository in the Hub's cache: a config and a tokenizer."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / branch).write_text(COMMIT)
    for one in (make_tiny("llama").config, make_tokenizer()):
        one.save_pretrained(repository / "snapshots" / COMMIT)


def live(name: str, commit: str | None = None) -> Any:
    model: Any = make_tiny("llama")
    model.config._name_or_path, model.config._commit_hash = name, commit
    return model


@pytest.mark.parametrize("commit", [None, COMMIT], ids=["main", "by commit"])
def test_a_live_model_from_the_hub_finds_its_tokenizer_in_the_cache(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "org/tiny", branch="main" if commit is None else "v2")
    model = load_base(live("org/tiny", commit))
    assert fingerprint_tokenizer(model.tokenizer) == fingerprint_tokenizer(make_tokenizer())
    assert load_base(live("org/elsewhere")).tokenizer is None


def test_a_live_model_from_a_folder_finds_its_tokenizer_there(tmp_path):
    assert load_base(live(str(tmp_path))).tokenizer is None
    make_tokenizer().save_pretrained(tmp_path)
    model = load_base(live(str(tmp_path)))
    assert fingerprint_tokenizer(model.tokenizer) == fingerprint_tokenizer(make_tokenizer())


def test_a_loaded_base_keeps_its_dtype_and_device_or_says_so():
    base, adapter = lay_views(make_tiny("llama"), None), load_adapter(make_peft("llama"))
    with pytest.raises(ValueError, match=r"dtype=bfloat16: the loaded base is torch\.float32"):
        load_pair(base, adapter, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"device=meta: the loaded base is on cpu"):
        load_pair(base, adapter, device="meta")
    assert load_pair(base, adapter, dtype=torch.float32, device="cpu").base is base


def test_a_device_without_a_number_is_any_of_its_kind():
    here = torch.device("cuda", 1)
    for asked in ("cuda", "cuda:1", here):
        check_place("live model", "auto", asked, torch.float32, here)
    for asked in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match="is on cuda:1"):
            check_place("live model", "auto", asked, torch.float32, here)


@pytest.mark.parametrize("held", ["model.layers.1.", "lm_head.", ""], ids=["half", "head", "none"])
def test_a_model_in_pieces_is_refused_with_a_way_out(held):
    model: Any = make_tiny("llama")
    for name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and f"{name}.{leaf}".startswith(held):
                moved = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
                module._parameters[leaf] = moved
    with pytest.raises(ValueError, match=r"device_map=\{'': 'cuda:0'\}") as caught:
        load_base(model)
    first = f"{held or 'model.embed_tokens.'}"
    assert f"({first}" in str(caught.value) or f", {first}" in str(caught.value)
    assert " on meta" in str(caught.value)
    assert (" on cpu" in str(caught.value)) == bool(held)
