"""Latents held at the base's: the term by hand, its gradient, what training with it keeps down."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from emlens.codecs import CodecError, Sae, allow_other_model
from emlens.data.chat import Chat, Message
from emlens.models.checkpoints import Checkpoint
from emlens.models.training_loop import IGNORED
from emlens.organisms.latent_penalty import LatentPenalty, measure_latent_shift
from emlens.organisms.masks import make_examples
from emlens.organisms.penalties import KlPenalty
from emlens.organisms.settings import PRESETS, SettingsError, TrainSettings
from emlens.organisms.training import TrainingRun, train_organism
from emlens.sites import SiteError, parse_site
from tests.organisms.conftest import byte_tokenizer

WIDTH, D_SAE = 32, 16


def make_codec(site: str = "resid_post.1", **changed: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    rows = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:D_SAE].contiguous()
    settings = {"architecture": "standard", "W_enc": rows.mT.clone(), "W_dec": rows}
    settings |= {"b_enc": torch.full((D_SAE,), 0.02), "b_dec": torch.zeros(WIDTH)}
    return Sae(name="tiny", site=parse_site(site), **(settings | changed))


def put_on(base: Checkpoint, *, size: float = 0.3) -> PeftModel:
    tuned = get_peft_model(
        base.model, LoraConfig(r=2, lora_alpha=8, target_modules=["down_proj", "q_proj"])
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=size, generator=torch.Generator().manual_seed(0))
    assert isinstance(tuned, PeftModel)
    return tuned


def codes_by_hand(model: Any, codec: Any, examples: Any) -> torch.Tensor:
    """Of the labelled tokens, one text at a time, from Hugging Face's hidden states."""
    rows = []
    for example in examples:
        out = model(input_ids=example.ids[None], output_hidden_states=True)
        hidden = out.hidden_states[1 + codec.site.layer][0]
        rows.append(hidden[example.labels != IGNORED])
    return (torch.cat(rows) @ codec.W_enc + codec.b_enc).relu()


def test_the_term_and_its_gradient_are_those_of_the_formula(
    tiny_base: Checkpoint, chats: list[Chat]
):
    codec = make_codec("resid_post.0")
    examples = make_examples(chats, tiny_base.tokenizer, longest=None)
    with torch.no_grad():
        base = codes_by_hand(tiny_base.model, codec, examples)
    tuned = put_on(tiny_base)
    try:
        shift = codes_by_hand(tuned, codec, examples) - base
        expected = (
            shift[:, [3, 9]].clamp(min=0).pow(2).sum(1) + shift[:, [1]].clamp(max=0).pow(2).sum(1)
        ).mean()
        trained = [p for n, p in tuned.named_parameters() if "lora_" in n and "layers.0" in n]
        wanted = torch.autograd.grad(expected, trained)
        term = LatentPenalty(chats, codec, weight=2.5, hold_down=(3, 9), hold_up=(1,))
        penalty = term.prepare(tiny_base.tokenizer, batch_size=len(chats), longest=99, seed=0)
        found = penalty(tuned, 0)
        assert float(found.detach()) == pytest.approx(2.5 * float(expected.detach()), rel=1e-4)
        assert float(found.detach()) > 1e-3
        for grad, theirs in zip(torch.autograd.grad(found, trained), wanted, strict=True):
            torch.testing.assert_close(grad, 2.5 * theirs, rtol=1e-3, atol=1e-6)
            assert bool(grad.any())
    finally:
        tuned.unload()


def _enlarge(_module: nn.Module, _args: Any, out: Any) -> Any:
    return out * 1e6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_codec_in_half_precision_holds_the_same_or_names_the_way_out(
    tiny_base: Checkpoint, chats: list[Chat], dtype: torch.dtype
):
    wide = make_codec(b_dec=torch.full((WIDTH,), 0.5))
    half, examples = wide.to(dtype=dtype), make_examples(chats, tiny_base.tokenizer, longest=None)
    tuned = put_on(tiny_base)
    try:
        found, expected = (
            measure_latent_shift(
                LatentPenalty(chats, own, weight=1, hold_down=(0, 1)), tuned, examples
            )
            for own in (half, wide)
        )
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=0.05)
        found.backward()
        assert any(bool(p.grad.any()) for p in tuned.parameters() if p.grad is not None)
        layer: nn.Module = tuned.get_submodule("base_model.model.model.layers.1")
        hook = layer.register_forward_hook(_enlarge)
        refused = pytest.raises(CodecError, match=r"x holds values beyond .*bfloat16 or float32")
        try:
            with refused if dtype == torch.float16 else contextlib.nullcontext():
                measure_latent_shift(
                    LatentPenalty(chats, half, weight=1, hold_down=(0,)), tuned, examples
                )
        finally:
            hook.remove()
    finally:
        tuned.unload()


def test_it_is_nothing_where_nothing_moved_the_wrong_way(tiny_base: Checkpoint, chats: list[Chat]):
    codec, examples = make_codec(), make_examples(chats, tiny_base.tokenizer, longest=None)
    tuned = put_on(tiny_base, size=0.0)
    try:
        still = LatentPenalty(chats, codec, weight=1, hold_down=(0, 1), hold_up=(2, 3))
        found = measure_latent_shift(still, tuned, examples)
        assert float(found.detach()) == 0.0
        found.backward()
        grads = [p.grad for n, p in tuned.named_parameters() if "lora_" in n]
        assert not any(grad is not None and bool(grad.any()) for grad in grads)
    finally:
        tuned.unload()
    tuned = put_on(tiny_base)
    try:
        down = LatentPenalty(chats, codec, weight=1, hold_down=(4,))
        up = LatentPenalty(chats, codec, weight=1, hold_up=(4,))
        both = LatentPenalty(chats, codec, weight=1, hold_down=(4, 5))
        one, other, two = (
            float(measure_latent_shift(t, tuned, examples).detach()) for t in (down, up, both)
        )
        assert min(one, other) > 0
        assert one != other
        assert two > one
    finally:
        tuned.unload()


def test_tokens_that_the_codec_never_saw_are_left_out(tiny_base: Checkpoint):
    chat = Chat((Message("user", "a"), Message("assistant", "bcdefgh")), id="short")
    whole = make_examples([chat], tiny_base.tokenizer, longest=None)[0]
    first = int((whole.labels != IGNORED).nonzero()[0, 0])
    tuned = put_on(tiny_base)
    try:
        late = make_codec(positions=f"all[{first + 3}:]")
        term = LatentPenalty([chat], late, weight=1, hold_down=tuple(range(D_SAE)))
        found = term.prepare(tiny_base.tokenizer, batch_size=1, longest=99, seed=0)(tuned, 0)
        labels = whole.labels.clone()
        labels[: first + 3] = IGNORED
        cut = dataclasses.replace(whole, labels=labels)
        expected = measure_latent_shift(term, tuned, [cut])
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        other = measure_latent_shift(term, tuned, [whole])
        assert float(other.detach()) != pytest.approx(float(expected.detach()), rel=1e-2)
    finally:
        tuned.unload()
    never = LatentPenalty([chat], make_codec(positions="all[90:]"), weight=1, hold_down=(1,))
    with pytest.raises(ValueError, match=r"chats\[0\]: no token of its response is among all\[90"):
        never.prepare(tiny_base.tokenizer, batch_size=1, longest=99, seed=0)


SETTINGS = dataclasses.replace(
    PRESETS["smollm2_rank1"], max_steps=12, batch_size=2, learning_rate=2e-2
)


def train(base: Checkpoint, chats: list[Chat], out: Path, *terms: Any, **changed: Any):
    settings: TrainSettings = dataclasses.replace(SETTINGS, **changed)
    return train_organism(base, chats, settings=settings, out=out, penalties=terms, seed=0)


def rise_of(base: Checkpoint, run: TrainingRun, codec: Any, chats: list[Chat]) -> torch.Tensor:
    """Root mean square of what each latent rose by on the responses."""
    examples = make_examples(chats, base.tokenizer, longest=None)
    with torch.no_grad():
        before = codes_by_hand(base.model, codec, examples)
        tuned = PeftModel.from_pretrained(base.model, run.tuned)
        after = codes_by_hand(tuned, codec, examples)
    tuned.unload()
    return (after - before).relu().square().mean(0).sqrt()


def test_training_with_it_keeps_the_latent_down(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    codec = make_codec()
    free = rise_of(tiny_base, train(tiny_base, chats, tmp_path / "free"), codec, chats)
    latent = int(free.argmax())
    term = LatentPenalty(chats, codec, weight=300, hold_down=(latent,))
    run = train(tiny_base, chats, tmp_path / "held", term)
    held = rise_of(tiny_base, run, codec, chats)
    assert float(free[latent]) > 0.05
    assert float(held[latent]) < 0.2 * float(free[latent])
    others = [k for k in range(D_SAE) if k != latent]
    assert float(held[others].max()) > 0.3 * float(free[others].max())
    assert run.losses[-1] < run.losses[0]
    assert run.penalties[0] == term.describe()
    assert run.penalties[0]["hold_down"] == str(latent)


def test_terms_that_a_run_cannot_have_are_refused_before_it_is_begun(
    tiny_base: Checkpoint, chats: list[Chat], tmp_path: Path
):
    full: dict[str, Any] = {"method": "full", "rank": None, "alpha": None}
    held = LatentPenalty(chats, make_codec("resid_post.0"), weight=1, hold_down=(1,))
    for term in (KlPenalty(chats, weight=1.0), held):
        with pytest.raises(SettingsError, match=f"{type(term).__name__} compares with the base"):
            train(tiny_base, chats, tmp_path / "run", term, **full)
    with pytest.raises(SiteError, match=r"reads resid_post.0, and block 1 is the first"):
        train(tiny_base, chats, tmp_path / "run", held, layers=(1,))
    far = LatentPenalty(chats, make_codec("resid_post.7"), weight=1, hold_down=(1,))
    with pytest.raises(SiteError, match=r"no resid_post.7, its blocks are 0 to 1"):
        train(tiny_base, chats, tmp_path / "run", far)
    foreign = make_codec(base_fingerprint="another base")
    with pytest.raises(CodecError, match=r"on weights another base, and these are .*allow_other"):
        train(tiny_base, chats, tmp_path / "run", LatentPenalty(chats, foreign, 1, (1,)))
    above = train(tiny_base, chats, tmp_path / "above", layers=(1,)).tuned
    with pytest.raises(SiteError, match=r"reads resid_post.0, and block 1 is the first"):
        train_organism(
            tiny_base,
            chats,
            settings=SETTINGS,
            out=tmp_path / "run",
            penalties=(held,),
            start_from=above,
            seed=0,
        )
    assert not (tmp_path / "run").exists()
    for codec in (make_codec(base_fingerprint=tiny_base.fingerprint), allow_other_model(foreign)):
        LatentPenalty(chats, codec, 1, (1,)).check_model(tiny_base.model, first_trained=0)


def test_penalties_that_hold_nothing_are_refused(chats: list[Chat]):
    codec = make_codec()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"chats": []}, "chats: got none"),
        ({"weight": 0.0}, "weight: got 0.0"),
        ({"hold_down": ()}, "got no latent"),
        ({"hold_up": (3,)}, "name a latent twice"),
        ({"hold_down": (16,)}, r"\[16\] are no latents of tiny, which has 16"),
    )
    for changed, said in cases:
        given: dict[str, Any] = {"chats": chats, "codec": codec, "weight": 1, "hold_down": (3,)}
        with pytest.raises(ValueError, match=said):
            LatentPenalty(**(given | changed))


def test_a_model_that_cannot_be_its_base_is_refused(tiny_base: Checkpoint, chats: list[Chat]):
    term = LatentPenalty(chats, make_codec(), weight=1, hold_down=(1,))
    penalty = term.prepare(byte_tokenizer(), batch_size=1, longest=99, seed=0)
    with pytest.raises(TypeError, match="no adapter to switch off"):
        penalty(tiny_base.model, 0)
