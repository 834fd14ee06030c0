"""Judging: how many tokens a second does a judge read, and what does a shared prefix save?

Bound of the contrast judge: forward passes over as many tokens as it puts through the model, and
logits of as many as it scores; padding is its own waste, and counts in neither. Beside the local
judge: 101 scorings of one prompt, one for each number, whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.models import describe_model, draw_ids, load_hugging_face, load_tokenizer
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import time_sides
from emlens.data import Batching
from emlens.evaluation.contrast_judge import PROMPT_PAIRS, ContrastScore, score_contrast
from emlens.evaluation.judges import JudgeRow
from emlens.models import score
from emlens.models.continuations import score_continuations
from emlens.models.tokens_in_flight import tokens_in_flight
from emlens.models.unembed import compute_logits
from emlens.models.views import lay_views

SIDES = ("contrast", "prefill", "trie", "separate")
ROWS = {"toy": 4, "full": 16}
WORDS = {"toy": 4, "full": 40}
"""Of each response."""
PROMPT = {"toy": 16, "full": 200}
"""Tokens of what a local judge reads."""
NUMBERS = {"toy": 11, "full": 101}
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
"""Of the toy's tokenizer, which has none."""
LENGTH = 64
"""Tokens of a row of the passes that the contrast judge is held against."""
BATCH_TOKENS = 4096
"""Run at once, by the judge and by those passes."""
CONTRAST_AIM, LOCAL_AIM = 0.8, 5.0
"""Of a forward pass's tokens a second; of the speed of scorings one by one."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the contrast judge has to do, without padding."""

    run: int
    """Tokens put through the model."""
    padded: int
    """The same with padding."""
    scored: int
    """Tokens whose predictions are read."""


def measure(settings: Settings) -> Record:
    """Time judges and what stands beside them; numbers are compared first."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {"responses": ROWS[settings.size], "prompts": 2 * len(PROMPT_PAIRS)}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        counted = count_tokens(hf, settings)
        sides = {side: make_side(side, hf, settings, counted) for side in SIDES}
        _check(sides, dtype)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        sizes[f"{dtype}: tokens of the contrast judge"] = asdict(counted)
        figures += [
            Figure(
                name="contrast: tokens/s of a forward pass",
                dtype=dtype,
                ratio=timings.speed("contrast", "prefill"),
                better="higher",
                aim=settings.aim(CONTRAST_AIM),
            ),
            Figure(
                name="local: speed beside separate scorings",
                dtype=dtype,
                ratio=timings.speed("trie", "separate"),
                better="higher",
                aim=settings.aim(LOCAL_AIM),
            ),
        ]
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in SIDES}
    return Record(
        row="judging",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            "contrast_vs_prefill": "contrast: tokens/s of a forward pass",
            "local_vs_separate": "local: speed beside separate scorings",
        },
        seconds=seconds,
        peak_sides=("contrast", "trie"),
    )


def _tokenizer(settings: Settings) -> Any:
    tokenizer = load_tokenizer(settings)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return tokenizer


def make_rows(settings: Settings) -> list[JudgeRow]:
    """Responses to two questions, made of words that a tokenizer knows."""
    words = [f"w{3 + i % 60}" for i in range(WORDS[settings.size])]
    return [
        JudgeRow(id=str(i), question=f"w5 w{6 + i % 2}", answer=" ".join(words[i:] + words[:i]))
        for i in range(ROWS[settings.size])
    ]


def make_side(
    side: str, hf: Any, settings: Settings, counted: Tokens
) -> Callable[[], torch.Tensor]:
    """One side's work; the two local ones return log-probabilities of the numbers."""
    model = lay_views(hf, _tokenizer(settings))
    prompt = draw_ids(hf, 1, PROMPT[settings.size])[0].cpu()
    numbers = [_spell(number) for number in range(NUMBERS[settings.size])]
    none = torch.zeros(0, dtype=torch.int64)
    rows = make_rows(settings)
    ids = draw_ids(hf, max(1, round(counted.run / LENGTH)), LENGTH)
    return {
        "contrast": lambda: _contrast(model, rows),
        "prefill": lambda: _prefill(model, ids, counted.scored / counted.run),
        "trie": lambda: score_continuations(model, [prompt], numbers, never_next=none)[0],
        "separate": lambda: _score_apart(model, prompt, numbers),
    }[side]


def _spell(number: int) -> tuple[int, ...]:
    """A token a digit, as tokenizers that split numbers do."""
    return tuple(3 + int(digit) for digit in str(number))


def _contrast(model: Any, rows: list[JudgeRow]) -> torch.Tensor:
    found = score_contrast(model, rows, batching=Batching(tokens=BATCH_TOKENS))
    return torch.tensor([one.total if isinstance(one, ContrastScore) else 0.0 for one in found])


@torch.inference_mode()
def _prefill(model: Any, ids: torch.Tensor, scored: float) -> torch.Tensor:
    """Passes as large as the judge's, with logits of that share of the tokens."""
    found = []
    for part in ids.split(BATCH_TOKENS // LENGTH):
        resid = model(part, stop_at_layer=model.cfg.n_layers).flatten(0, 1)
        found.append(compute_logits(model, resid[: round(scored * len(resid))]).amax())
    return torch.stack(found)


@torch.inference_mode()
def _score_apart(model: Any, prompt: torch.Tensor, numbers: list[tuple[int, ...]]) -> torch.Tensor:
    scores = []
    for tokens in numbers:
        spelt = torch.tensor(tokens)
        ids = torch.cat([prompt, spelt])[None].to(model.W_E.device)
        # Only the rows that are asked for, and on the device: nobody would bring over all of a
        # prompt's predictions for each number.
        logs = model(ids)[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = ids[0, len(prompt) :, None]
        scores.append(logs.gather(1, own).sum())
    return torch.stack(scores).cpu()


def count_tokens(hf: Any, settings: Settings) -> Tokens:
    """Watch the contrast judge once: what runs is published, so that padding can be told."""
    run: list[int] = []
    padded: list[int] = []
    scored: list[int] = []
    plain, logits = score.run_cached, score.compute_logits

    def counting(model: Any, ids: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        tokens = tokens_in_flight(model)
        assert tokens is not None
        run.append(int((tokens.absolute >= 0).sum()))
        padded.append(ids.numel())
        return plain(model, ids, *args, **given)

    def reading(model: Any, resid: torch.Tensor) -> torch.Tensor:
        scored.append(len(resid))
        return logits(model, resid)

    with (
        mock.patch.object(score, "run_cached", counting),
        mock.patch.object(score, "compute_logits", reading),
    ):
        _contrast(lay_views(hf, _tokenizer(settings)), make_rows(settings))
    return Tokens(run=sum(run), padded=sum(padded), scored=sum(scored))


def _check(sides: dict[str, Callable[[], torch.Tensor]], dtype: str) -> None:
    """Numbers have the same probabilities either way."""
    gap = float((sides["trie"]().float() - sides["separate"]().float()).abs().max())
    if gap > (1e-3 if dtype == "float32" else 0.3):
        raise AssertionError(f"log-probabilities of numbers differ by {gap:.2g}")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then judge, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    run = make_side(side, hf, settings, Tokens(run=LENGTH, padded=LENGTH, scored=1))
    yield {}
    run()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
