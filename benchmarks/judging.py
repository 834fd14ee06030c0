"""Judging: how many tokens a second does a judge read, and what does a shared prefix save?

Bound of the contrast judge: one forward pass over as many tokens as it puts through the model, with
logits. Beside the local judge: 101 scorings of one prompt, one for each number, whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.models import describe_model, draw_ids, load_hugging_face, load_tokenizer
from benchmarks.records import Figure, Record
from benchmarks.rows import measure_peaks, run_alone
from benchmarks.settings import Settings
from benchmarks.timing import time_sides
from emlens.data import Batching
from emlens.evaluation.contrast_judge import PROMPT_PAIRS, ContrastScore, score_contrast
from emlens.evaluation.judges import JudgeRow
from emlens.models import kv_cache, score
from emlens.models.continuations import score_continuations
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
CONTRAST_AIM, LOCAL_AIM = 0.8, 5.0
"""Of a forward pass's tokens a second; of the speed of scorings one by one."""


def measure(settings: Settings) -> Record:
    """Time judges and what stands beside them; numbers are compared first."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    sizes: dict[str, Any] = {"responses": ROWS[settings.size], "prompts": 2 * len(PROMPT_PAIRS)}
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        tokens = _count_tokens(hf, settings)
        sides = {side: make_side(side, hf, settings, tokens) for side in SIDES}
        _check(sides, dtype)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        sizes[f"{dtype}: tokens of the contrast judge"] = tokens
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
        peak_bytes=measure_peaks("judging", ("contrast", "trie"), settings),
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


def make_side(side: str, hf: Any, settings: Settings, tokens: int) -> Callable[[], torch.Tensor]:
    """One side's work; the two local ones return log-probabilities of the numbers."""
    model = lay_views(hf, _tokenizer(settings))
    prompt = draw_ids(hf, 1, PROMPT[settings.size])[0]
    numbers = [_spell(number, hf) for number in range(NUMBERS[settings.size])]
    none = torch.zeros(0, dtype=torch.int64)
    rows = make_rows(settings)
    length = 64
    ids = draw_ids(hf, max(1, round(tokens / length)), length)
    return {
        "contrast": lambda: _contrast(model, rows),
        "prefill": lambda: _prefill(model, ids),
        "trie": lambda: score_continuations(model, [prompt], numbers, never_next=none)[0],
        "separate": lambda: _score_apart(model, prompt, numbers),
    }[side]


def _spell(number: int, hf: Any) -> tuple[int, ...]:
    """A token a digit, as tokenizers that split numbers do."""
    return tuple(3 + int(digit) for digit in str(number))


def _contrast(model: Any, rows: list[JudgeRow]) -> torch.Tensor:
    found = score_contrast(model, rows, batching=Batching(tokens=4096))
    return torch.tensor([one.total if isinstance(one, ContrastScore) else 0.0 for one in found])


@torch.inference_mode()
def _prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(part)[:, -1].amax() for part in ids.split(16)])


@torch.inference_mode()
def _score_apart(model: Any, prompt: torch.Tensor, numbers: list[tuple[int, ...]]) -> torch.Tensor:
    scores = []
    for tokens in numbers:
        spelt = torch.tensor(tokens)
        logs = model(torch.cat([prompt, spelt])[None])[0].float().log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(spelt))
        scores.append(logs[at, spelt].sum())
    return torch.stack(scores)


def _count_tokens(hf: Any, settings: Settings) -> int:
    """Tokens that the contrast judge puts through the model, padding included."""
    seen: list[int] = []
    plain = kv_cache.run_cached

    def counting(model: Any, ids: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        seen.append(ids.numel())
        return plain(model, ids, *args, **given)

    score.run_cached = counting
    try:
        _contrast(lay_views(hf, _tokenizer(settings)), make_rows(settings))
    finally:
        score.run_cached = plain
    return sum(seen)


def _check(sides: dict[str, Callable[[], torch.Tensor]], dtype: str) -> None:
    """Numbers have the same probabilities either way."""
    gap = float((sides["trie"]().float() - sides["separate"]().float()).abs().max())
    if gap > (1e-3 if dtype == "float32" else 0.3):
        raise AssertionError(f"log-probabilities of numbers differ by {gap:.2g}")


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then judge, pausing after each for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    run = make_side(side, hf, settings, 64)
    yield {}
    run()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
