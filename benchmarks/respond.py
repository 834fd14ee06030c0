"""Respond: how many tokens a second when many chats are answered with up to 100 tokens each?

Bound: none; responses end when they end. What padding and ended rows waste is stated instead.
Beside it: Hugging Face's batched generate, sdpa attention, on the same batches of left-padded
prompts. Both sides render, tokenise, generate and decode. Greedy responses are checked to be equal;
sampled ones differ in length, so time is taken per token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.models import describe_model, load_hugging_face, load_tokenizer, make_chats
from benchmarks.records import Figure, Record
from benchmarks.reference import check_tokens
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import Timings, time_sides
from emlens.data import Batching, Chat, load_chats, pad_batch, plan_batches, tokenize_chat
from emlens.interventions.generate import Responses, generate_responses
from emlens.models.generate import Sampling, stop_tokens
from emlens.models.views import lay_views

NEW = {"toy": 12, "full": 100}
BATCH = {"toy": 4, "full": 16}
"""Rows of the longest prompt that are run at once."""
CHATS = 8
"""At toy size; at full size all of the shipped questions."""
SIDES = ("emlens", "huggingface")
WAYS = {"greedy": 0.0, "sampled": 1.0}
"""Temperatures."""

Answer = Callable[[], list[list[int]]]
"""Responses as ids, in the order of the chats."""


def measure(settings: Settings) -> Record:
    """Time both sides on the same chats, in each dtype, greedy and sampled."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {
        "new": NEW[settings.size],
        "batch": BATCH[settings.size],
        "chats": len(choose_chats(settings)),
    }
    sizes["responses a side"] = sizes["chats"] * settings.rounds
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        for way, temperature in WAYS.items():
            sides = {side: make_side(side, hf, settings, temperature) for side in SIDES}
            if way == "greedy":
                _check(sides, hf, settings)
            timings = _time_per_token(sides, settings)
            figures.append(
                Figure(
                    name=f"{way}: tokens/s vs_huggingface",
                    dtype=dtype,
                    ratio=timings.speed("emlens", "huggingface"),
                    better="higher",
                    aim=settings.aim(1.0),
                )
            )
            for side in SIDES:
                seconds[f"{way}, {dtype}: {side}, a token"] = timings.median(side)
            found = _respond(lay_views(hf, load_tokenizer(settings)), settings, temperature)
            sizes[f"{way}, {dtype}: padding waste"] = found.padding_waste
            sizes[f"{way}, {dtype}: tokens/s"] = 1 / timings.median("emlens")
    return Record(
        row="respond",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={f"{way}_vs_huggingface": f"{way}: tokens/s vs_huggingface" for way in WAYS},
        seconds=seconds,
        peak_sides=SIDES,
    )


def _time_per_token(sides: dict[str, Answer], settings: Settings) -> Timings:
    """Seconds a token of every round."""
    counts: dict[str, list[int]] = {side: [] for side in sides}

    def counted(side: str) -> Callable[[], None]:
        return lambda: counts[side].append(sum(map(len, sides[side]())))

    timings = time_sides(
        {side: counted(side) for side in sides},
        rounds=settings.rounds,
        device=settings.device,
        clock=settings.read_clock,
    )
    return Timings(
        seconds={
            # The first calls were a warm-up.
            side: tuple(s / n for s, n in zip(taken, counts[side][-len(taken) :], strict=True))
            for side, taken in timings.seconds.items()
        }
    )


def make_side(side: str, hf: Any, settings: Settings, temperature: float) -> Answer:
    """One side's way of answering all chats."""
    tokenizer = load_tokenizer(settings)
    model = lay_views(hf, tokenizer)
    if side == "emlens":
        return lambda: [
            list(one.ids[one.prompt_tokens :])
            for one in _respond(model, settings, temperature).responses
        ]
    stops = list(stop_tokens(model))
    return lambda: _respond_hugging_face(hf, tokenizer, stops, settings, temperature)


def choose_chats(settings: Settings) -> list[Chat]:
    """Shipped questions, or at toy size random words; prompts of different lengths."""
    if settings.full:
        return load_chats("emlens:broad-questions")
    return [make_chats(settings, 1, 5 * (3 + row))[0].without_response() for row in range(CHATS)]


def _respond(model: Any, settings: Settings, temperature: float) -> Responses:
    sampling = Sampling(1, temperature=temperature, max_new_tokens=NEW[settings.size])
    return generate_responses(
        model, choose_chats(settings), sampling=sampling, batching=_batching(model, settings)
    )


def _tokenize(tokenizer: Any, settings: Settings) -> list[Any]:
    return [tokenize_chat(chat, tokenizer, for_generation=True) for chat in choose_chats(settings)]


def _batching(model: Any, settings: Settings) -> Batching:
    longest = max(len(prompt.ids) for prompt in _tokenize(model.tokenizer, settings))
    return Batching(tokens=BATCH[settings.size] * (longest + NEW[settings.size]))


def _respond_hugging_face(
    hf: Any, tokenizer: Any, stops: list[int], settings: Settings, temperature: float
) -> list[list[int]]:
    prompts = _tokenize(tokenizer, settings)
    new = NEW[settings.size]
    hf.generation_config = GenerationConfig(
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0} if temperature else {}),
        max_new_tokens=new,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    lengths = [len(prompt.ids) + new for prompt in prompts]
    batching = Batching(tokens=BATCH[settings.size] * max(lengths))
    found: dict[int, list[int]] = {}
    for rows in plan_batches(lengths, batching):
        batch = pad_batch(prompts, rows, pad_id=stops[0])
        ids, mask = batch.ids.to(hf.device), batch.mask.to(hf.device)
        said: Tensor = hf.generate(ids, attention_mask=mask)[:, ids.shape[1] :]
        tokenizer.batch_decode(said, skip_special_tokens=True)
        for row, text in zip(rows, said.tolist(), strict=True):
            ends = [place for place, token in enumerate(text) if token in stops]
            found[row] = text[: ends[0] + 1] if ends else text
    return [found[row] for row in range(len(prompts))]


def _check(sides: dict[str, Answer], hf: Any, settings: Settings) -> None:
    """Equal greedy tokens row by row, but for near-ties."""
    prompts = _tokenize(load_tokenizer(settings), settings)
    for prompt, ours, theirs in zip(
        prompts, sides["emlens"](), sides["huggingface"](), strict=True
    ):
        shared = min(len(ours), len(theirs))
        mine, other = (torch.tensor(t[:shared])[None].to(hf.device) for t in (ours, theirs))
        check_tokens(mine, other, hf, prompt.ids[None].to(hf.device))
        if len(ours) != len(theirs) and torch.equal(mine, other):
            raise AssertionError(f"a response has {len(ours)} tokens, Hugging Face's {len(theirs)}")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then answer, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    answer = make_side(side, hf, settings, 0.0)
    yield {}
    answer()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
