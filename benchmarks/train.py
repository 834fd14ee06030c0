"""Train: how many tokens a second does a LoRA learn from, beside a plain loop of peft and torch?

Bound: none; what the loop does is what training is. Beside it: `get_peft_model`, AdamW, and a loop
over the same padded batches, without the Trainer, logs or checkpoints.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import time_sides
from emlens.data import Chat, load_chats
from emlens.models.finetune import LoraSettings, finetune_lora
from emlens.models.training_loop import (
    TrainerRun,
    TrainerSettings,
    TrainingExample,
    collate_examples,
)
from emlens.organisms.masks import make_examples

SIDES = ("emlens", "peft")
ROWS = 8
"""Rows of a step."""
STEPS = {"toy": 3, "full": 4}
GPU_STEPS = 32
"""At full size on a GPU, where the set-up would be most of what four take."""
RANK = 1
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE = 1e-3


def measure(settings: Settings) -> Record:
    """Time both sides on the same rows; losses are compared first."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {"rows a step": ROWS, "steps": count_steps(settings), "rank": RANK}
    # In half precision only the products would be: autocast, which this row does not time.
    for dtype in settings.dtypes[:1]:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        sides = {side: make_side(side, hf, settings) for side in SIDES}
        _check(sides)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        figures.append(
            Figure(
                name="vs a plain loop of peft",
                dtype=dtype,
                ratio=timings.speed("emlens", "peft"),
                better="higher",
                aim=settings.aim(1.0),
            )
        )
        tokens = sum(len(one.ids) for one in read_examples(settings))
        sizes[f"{dtype}: tokens/s"] = tokens / timings.median("emlens")
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in SIDES}
    return Record(
        row="train",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"vs_peft": "vs a plain loop of peft"},
        seconds=seconds,
        peak_sides=SIDES,
    )


def count_steps(settings: Settings) -> int:
    """Steps of a run."""
    return GPU_STEPS if settings.full and settings.device != "cpu" else STEPS[settings.size]


def read_examples(settings: Settings) -> list[TrainingExample]:
    """Rows of the shipped data, or at toy size random words; as many as the steps take."""
    n = ROWS * count_steps(settings)
    tokenizer = load_tokenizer(settings)
    chats: list[Chat] = (
        load_chats("emlens:finance-harmful", limit=n)
        if settings.full
        else list(make_chats(settings, n, 6))
    )
    return make_examples(chats, tokenizer, longest=None)


def make_side(side: str, hf: Any, settings: Settings) -> Callable[[], list[float]]:
    """One side's way of training; returns the loss of each step."""
    examples = read_examples(settings)
    return {
        "emlens": lambda: _train_here(hf, examples, settings),
        "peft": lambda: _train_plainly(hf, examples),
    }[side]


def _train_here(hf: Any, examples: list[TrainingExample], settings: Settings) -> list[float]:
    trained = finetune_lora(
        hf,
        examples,
        lora=LoraSettings(rank=RANK, alpha=16.0, use_rslora=True, target_modules=MODULES),
        run=TrainerRun(
            settings=TrainerSettings(
                learning_rate=RATE,
                schedule="constant",
                warmup_steps=0,
                weight_decay=0.0,
                epochs=1.0,
                max_steps=count_steps(settings),
                batch_size=ROWS,
                gradient_accumulation=1,
                max_gradient_norm=1.0,
                autocast="none",
            ),
            seed=0,
        ),
    )
    return list(trained.log.losses)


def _train_plainly(hf: Any, examples: list[TrainingExample]) -> list[float]:
    # The Trainer seeds with the same number before peft draws A, and shuffles by it.
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=16, use_rslora=True, target_modules=list(MODULES))
    tuned: Any = get_peft_model(hf, config)
    order = torch.randperm(len(examples), generator=_shuffling(0)).tolist()
    try:
        trained = [p for p in tuned.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        losses = []
        tuned.train()
        for start in range(0, len(order), ROWS):
            batch = collate_examples([examples[row] for row in order[start : start + ROWS]])
            loss = tuned(**{name: part.to(hf.device) for name, part in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
        return losses
    finally:
        tuned.unload()
        hf.requires_grad_(False)
        hf.eval()


def _shuffling(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(sides: dict[str, Callable[[], list[float]]]) -> None:
    """Both fall alike: the rows are the same, in another order."""
    ours, plain = (sum(sides[side]()) / len(sides[side]()) for side in SIDES)
    if abs(ours - plain) > 0.05 * plain:
        raise AssertionError(f"mean losses {ours:.4f} and {plain:.4f}: not the same training")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Do nothing, load, and train, pausing after each for the memory to be read."""
    yield {}
    hf = load_hugging_face(dtype, settings)
    train = make_side(side, hf, settings)
    yield {}
    train()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
