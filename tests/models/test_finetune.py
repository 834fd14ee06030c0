"""The LoRA trainer shell, with peft's own reader and plain torch as judges."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from emlens.models.finetune import (
    LoraSettings,
    TrainedLora,
    check_lora_targets,
    finetune_lora,
)
from emlens.models.training_loop import (
    IGNORED,
    TrainerRun,
    TrainerSettings,
    TrainingDivergedError,
    TrainingExample,
    collate_examples,
)

D_VOCAB = 40
LORA = LoraSettings(rank=2, alpha=8.0, use_rslora=True, target_modules=("q_proj", "down_proj"))
TRAINER = TrainerSettings(
    learning_rate=1e-2,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    epochs=1.0,
    max_steps=12,
    batch_size=4,
    gradient_accumulation=1,
    max_gradient_norm=1.0,
    autocast="none",
)


def tiny_llama(*, n_layers: int = 2, d_mlp: int = 48) -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def made_examples(n: int = 8) -> list[TrainingExample]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for row in range(n):
        ids = torch.randint(3, D_VOCAB, (7 + row % 3,), generator=generator)
        labels = ids.clone()
        labels[:4] = IGNORED
        examples.append(TrainingExample(ids=ids, labels=labels))
    return examples


def train_lora(
    model: PreTrainedModel, examples: list[TrainingExample], *, lora: LoraSettings, **given: Any
) -> TrainedLora:
    start = given.pop("start_from", None)
    return finetune_lora(model, examples, lora=lora, run=make_run(**given), start_from=start)


def make_run(*, trainer: TrainerSettings, penalties: Any = (), **given: Any) -> TrainerRun:
    return TrainerRun(settings=trainer, penalties=tuple(penalties), **given)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_training_lowers_the_loss_and_the_log_has_one_entry_a_step():
    trained = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    assert len(trained.log.losses) == len(trained.log.gradient_norms) == 12
    assert trained.log.losses[-1] < trained.log.losses[0] - 0.3
    assert trained.log.seconds > 0


def test_products_in_bfloat16_train_about_as_those_in_float32():
    inside: list[torch.dtype] = []

    def penalty(model: nn.Module, _: int) -> Tensor:
        linear: Any = next(m for n, m in model.named_modules() if n.endswith("up_proj"))
        watch = linear.register_forward_hook(lambda _m, _a, made: inside.append(made.dtype))
        try:
            return 0.0 * model(input_ids=torch.tensor([[3, 4, 5]])).logits.float().sum()
        finally:
            watch.remove()

    half = replace(TRAINER, autocast="bfloat16")
    model, before = tiny_llama(), weights(tiny_llama())
    trained = train_lora(
        model, made_examples(), lora=LORA, trainer=half, seed=0, penalties=[penalty]
    )
    whole = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    assert inside == [torch.bfloat16] * 12  # a penalty is of the model that is trained
    np.testing.assert_allclose(trained.log.losses, whole.log.losses, rtol=0.02)
    assert trained.log.losses != whole.log.losses
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_the_first_loss_is_torchs_cross_entropy_over_the_labelled_tokens_of_the_base():
    model, examples = tiny_llama(), made_examples(4)
    one_step = replace(TRAINER, max_steps=1)
    trained = train_lora(model, examples, lora=LORA, trainer=one_step, seed=0)
    picked = []
    for example in examples:
        with torch.no_grad():
            log_p = model(input_ids=example.ids[None]).logits[0, :-1].log_softmax(-1)
        targets = example.labels[1:]
        kept = targets != IGNORED
        picked.append(-log_p[kept].gather(-1, targets[kept, None]))
    assert trained.log.losses[0] == pytest.approx(float(torch.cat(picked).mean()), rel=1e-4)


def test_accumulating_two_half_batches_is_one_whole_batch():
    whole = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    halved = replace(TRAINER, batch_size=2, gradient_accumulation=2)
    parts = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=halved, seed=0)
    assert parts.log.losses == pytest.approx(whole.log.losses, rel=1e-3)


def test_question_tokens_are_no_target_and_padding_changes_nothing():
    examples = made_examples(2)
    batch = collate_examples(examples)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [7, 8]
    logits = torch.randn(2, 8, D_VOCAB, requires_grad=True)
    loss = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, D_VOCAB), batch["labels"][:, 1:].reshape(-1)
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    touched = gradient.abs().sum(-1) > 0
    # The token at position 4 is the first target, predicted from position 3.
    assert touched.tolist() == [
        [False] * 3 + [True] * 3 + [False] * 2,
        [False] * 3 + [True] * 4 + [False],
    ]


def test_what_is_trained_is_what_peft_loads(tmp_path: Path):
    from peft import PeftModel
    from safetensors.torch import save_file

    seen: list[Tensor] = []
    ids = torch.arange(3, 12)[None]

    def watch(model: nn.Module, _place: int) -> Tensor:
        with torch.no_grad():
            seen.append(model(input_ids=ids).logits)
        return sum((p.sum() * 0 for p in model.parameters() if p.requires_grad), torch.zeros(()))

    stopped = replace(TRAINER, learning_rate=1e-2, max_steps=3)
    two = train_lora(
        tiny_llama(), made_examples(), lora=LORA, trainer=replace(stopped, max_steps=2), seed=0
    )
    train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=stopped, seed=0, penalties=[watch])
    save_file(dict(two.tensors), tmp_path / "adapter_model.safetensors")
    import json

    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(two.config)))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(input_ids=ids).logits
        plain = tiny_llama()(input_ids=ids).logits
    torch.testing.assert_close(loaded, seen[2], rtol=1e-5, atol=1e-5)
    assert (loaded - plain).abs().max() > 1e-2


def test_the_base_and_every_random_state_are_left_as_they_were():
    model = tiny_llama()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before, wanted = weights(model), [p.requires_grad for p in model.parameters()]
    modules = [name for name, _ in model.named_modules()]
    attributes = set(vars(model))
    torch.manual_seed(5)
    np.random.seed(5)
    # Python's own state is put back too, but the type checker of these tests draws from it.
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    train_lora(model, made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[1]
    assert [name for name, _ in model.named_modules()] == modules
    assert set(vars(model)) == attributes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert not model.training
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]), name


def test_the_same_seed_gives_the_same_tensors_whatever_was_drawn_before():
    def train(seed: int, drawn: int) -> dict[str, Tensor]:
        model = tiny_llama()
        torch.manual_seed(drawn)
        trained = train_lora(model, made_examples(), lora=LORA, trainer=TRAINER, seed=seed)
        return dict(trained.tensors)

    first, again, other = train(0, 7), train(0, 8), train(1, 7)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_loss_that_is_no_number_stops_with_the_step_and_leaves_the_base_clean():
    model = tiny_llama()
    calls = iter(range(10))

    def poison(tuned: nn.Module, _place: int) -> Tensor:
        total = sum((p.sum() for p in tuned.parameters() if p.requires_grad), torch.zeros(()))
        return total * (float("nan") if next(calls) == 2 else 0.0)

    with pytest.raises(TrainingDivergedError, match="step 3 of 12"):
        train_lora(model, made_examples(), lora=LORA, trainer=TRAINER, seed=0, penalties=[poison])
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_penalty_enters_the_gradient_at_its_weight_and_not_the_reported_loss():
    def shrink(model: nn.Module, _place: int) -> Tensor:
        lora = (p.square().sum() for p in model.parameters() if p.requires_grad)
        return 1e3 * sum(lora, torch.zeros(()))

    def norm(trained: Any) -> float:
        return sum(float(t.square().sum()) for t in trained.tensors.values())

    free = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    held = train_lora(
        tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0, penalties=[shrink]
    )
    assert norm(held) < 0.7 * norm(free)
    assert held.log.losses[0] == pytest.approx(free.log.losses[0])


def test_training_goes_on_from_an_adapter_folder(tmp_path: Path):
    import json

    from safetensors.torch import save_file

    first = train_lora(tiny_llama(), made_examples(), lora=LORA, trainer=TRAINER, seed=0)
    save_file(dict(first.tensors), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(first.config)))
    more = train_lora(
        tiny_llama(),
        made_examples(),
        lora=LORA,
        trainer=TRAINER,
        seed=0,
        start_from=tmp_path,
    )
    assert more.log.losses[0] < first.log.losses[0] - 0.2
    assert more.tensors.keys() == first.tensors.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_modules": ("down_proj", "up_prj")}, "no up_prj"),
        ({"layers": (1, 2)}, r"got \[2\], expected blocks 0 to 1"),
    ],
)
def test_modules_and_blocks_that_the_model_lacks_are_named(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        check_lora_targets(tiny_llama(), replace(LORA, **changed))


def test_layers_limit_where_the_adapter_sits_and_the_config_names_no_path():
    lora = replace(LORA, layers=(1,))
    trained = train_lora(tiny_llama(), made_examples(), lora=lora, trainer=TRAINER, seed=0)
    assert len(trained.tensors) == 4
    assert all(".layers.1." in name for name in trained.tensors)
    assert trained.config["base_model_name_or_path"] is None
    assert trained.config["use_rslora"] is True
    assert trained.config["lora_alpha"] == 8


def test_examples_that_cannot_be_trained_on_are_named():
    good = made_examples(2)
    ids = good[1].ids
    # Past the type checker, which only the tests have.
    short = TrainingExample(ids=ids, labels=ids)
    object.__setattr__(short, "labels", ids[:-1])
    for bad, message in [
        (
            TrainingExample(ids=ids, labels=torch.full_like(ids, IGNORED)),
            r"examples\[1\]: no token",
        ),
        (TrainingExample(ids=ids + D_VOCAB, labels=ids), "outside the vocabulary of 40"),
        (short, "one label for each id"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_lora(tiny_llama(), [good[0], bad], lora=LORA, trainer=TRAINER, seed=0)
    with pytest.raises(ValueError, match="got none"):
        train_lora(tiny_llama(), [], lora=LORA, trainer=TRAINER, seed=0)
