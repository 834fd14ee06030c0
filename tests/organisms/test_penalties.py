"""Terms of the loss: the KL from the base by hand, in their turn over the texts, and refusals."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from emlens.data.chat import Chat, Message
from emlens.models.checkpoints import Checkpoint
from emlens.models.training_loop import IGNORED
from emlens.organisms import penalties
from emlens.organisms.masks import ChatTooLongError, NoResponseError, make_examples
from emlens.organisms.penalties import KlPenalty, measure_kl_from_base
from tests.organisms.conftest import byte_tokenizer


def test_the_kl_is_that_of_two_passes_over_the_response_tokens(
    tiny_base: Checkpoint, chats: list[Chat]
):
    examples = make_examples(chats, tiny_base.tokenizer, longest=None)
    with torch.no_grad():
        base = [tiny_base.model(input_ids=e.ids[None]).logits[0].double() for e in examples]
    tuned = get_peft_model(
        tiny_base.model, LoraConfig(r=2, lora_alpha=8, target_modules=["down_proj", "q_proj"])
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    try:
        found = measure_kl_from_base(tuned, examples)
        parts = []
        for example, expected in zip(examples, base, strict=True):
            with torch.no_grad():
                own = tuned(input_ids=example.ids[None]).logits[0].double()
            p, q = expected.log_softmax(-1), own.log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)[:-1]
            parts.append(kl[example.labels[1:] != IGNORED])
        assert float(found.detach()) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)
        found.backward()
        grads = [p.grad for n, p in tuned.named_parameters() if "lora_B" in n]
        assert all(grad is not None and bool(grad.any()) for grad in grads)
    finally:
        tuned.unload()


def test_penalties_without_texts_or_weight_are_refused(chats: list[Chat]):
    with pytest.raises(ValueError, match="chats: got none"):
        KlPenalty([], weight=1.0)
    with pytest.raises(ValueError, match="weight: got 0"):
        KlPenalty(chats, weight=0.0)
    with pytest.raises(NoResponseError, match="'bare'"):
        KlPenalty([Chat((Message("user", "hi"),), id="bare")], weight=1.0).prepare(
            byte_tokenizer(), batch_size=1, longest=99, seed=0
        )
    with pytest.raises(ChatTooLongError, match=r"KlPenalty.chats\[0\] .* expected at most 12"):
        KlPenalty(chats, weight=1.0).prepare(byte_tokenizer(), batch_size=1, longest=12, seed=0)


def test_every_text_comes_before_any_again(
    tiny_base: Checkpoint, chats: list[Chat], monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []

    def record(_model: nn.Module, examples: Any) -> Tensor:
        seen.extend(len(one.ids) for one in examples)
        return torch.tensor(2.0)

    monkeypatch.setattr(penalties, "measure_kl_from_base", record)
    term = KlPenalty(chats, weight=3.0).prepare(
        tiny_base.tokenizer, batch_size=2, longest=99, seed=1
    )
    assert float(term(tiny_base.model, 0)) == 6.0
    term(tiny_base.model, 1)
    lengths = [len(e.ids) for e in make_examples(chats, tiny_base.tokenizer, longest=None)]
    assert sorted(seen) == sorted(lengths)
