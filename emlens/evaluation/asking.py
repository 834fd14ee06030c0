"""What judges share that ask a model elsewhere: their prompts, and what becomes of its replies.

Nothing is sent from here. Not for a model whose logits are at hand: see `LocalJudge`.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from emlens.evaluation.judge_prompts import (
    PROMPTS,
    fill_prompt,
    read_number,
    weigh_numbers,
    write_numbers,
)
from emlens.evaluation.judges import Judgement, JudgeRow

ALTERNATIVES = 20
"""Log-probabilities asked for at the first token; the most that endpoints give."""
PLAIN = "Reply with the number 50 and nothing else."
"""Asked where a request was refused and none was taken yet: nobody refuses it for what it holds."""
MOST_SAID = 300
"""Characters of an endpoint's message that are shown."""
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "[INST]", "[/INST]")
"""Ends of turns in common templates; the tokenizer of a model elsewhere is not known."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer of a model that was asked for a number."""

    text: str
    """What it said, or in brackets why it said nothing."""
    tokens: Sequence[Any] = ()
    """Of the answer, with `token`, `logprob` and `top_logprobs`; none where there were none."""


Ask = Callable[[str, int | None], Awaitable[Reply]]
"""(prompt, draw) -> reply: the likeliest with its log-probabilities for draw None, else that of a
draw at temperature 1, numbered so that equal requests can be told apart."""
Details = Mapping[str, float | str | None]
Gather = Callable[..., Awaitable[Sequence[Any]]]
"""Awaits several at a time, in the manner of the event loop that runs."""
Returned = TypeVar("Returned")


def fill_prompts(row: JudgeRow) -> dict[str, str]:
    """What is asked about a response, by score; nothing about one without words."""
    if not row.answer.split():
        return {}
    return {name: fill_prompt(name, row, delimiters=SPECIAL) for name in PROMPTS}


async def ask_for_scores(
    prompts: Mapping[str, str], ask: Ask, *, samples: int, gather: Gather
) -> Judgement:
    """Have one response scored.

    Args:
        prompts: as `fill_prompts` gives them.
        ask: sends a prompt.
        samples: answers drawn where log-probabilities do not serve.
        gather: such as `asyncio.gather`.
    """
    asked = (_ask_for_score(prompt, ask, samples, gather) for prompt in prompts.values())
    found = dict(zip(prompts, await gather(*asked), strict=True))
    scores = {name: score for name, (score, _) in found.items()}
    return Judgement(
        aligned=scores.get("aligned"),
        coherent=scores.get("coherent"),
        raw={f"{name}_{k}": v for name, (_, details) in found.items() for k, v in details.items()},
    )


async def _ask_for_score(
    prompt: str, ask: Ask, samples: int, gather: Gather
) -> tuple[float | None, Details]:
    """One score, and what it was made of."""
    reply = await ask(prompt, None)
    weights = read_weights(reply.tokens)
    if weights is not None:
        numbers, mass = weights
        made_of = {"mass": mass, "way": "log-probabilities", "numbers": write_numbers(numbers)}
        return weigh_numbers(numbers), {**made_of, "said": reply.text}
    # Who refuses to give log-probabilities may answer without them.
    drawn = await gather(*(ask(prompt, draw) for draw in range(samples)))
    return average_answers([reply.text for reply in drawn])


def read_weights(tokens: Sequence[Any]) -> tuple[dict[int, float], float] | None:
    """Probability of each number at the first token, and of all together.

    None where there are no log-probabilities, or numbers may be split, so that the first token of
    `85` is `8`: only a number of two digits among the alternatives shows that they are not.

    Args:
        tokens: of a reply.
    """
    if not tokens:
        return None
    texts = [entry.token for entry in tokens]
    if len(texts) > 1 and texts[0].strip().isdigit() and texts[1][:1].isdigit():
        return None
    alternatives = tokens[0].top_logprobs or [tokens[0]]
    read = [read_number(entry.token) for entry in alternatives]
    if not any(number is not None and number > 9 for number in read):
        return None  # nothing shows that a number of two digits is one token here
    numbers: dict[int, float] = {}
    for entry in alternatives:
        number = read_number(entry.token)
        if number is not None and entry.logprob is not None:
            numbers[number] = numbers.get(number, 0.0) + math.exp(min(0.0, entry.logprob))
    return numbers, math.fsum(numbers.values())


def average_answers(texts: Sequence[str]) -> tuple[float | None, Details]:
    """Mean of the answers that are numbers, and what it was made of."""
    numbers: dict[int, float] = {}
    for number in map(read_number, texts):
        if number is not None:
            numbers[number] = numbers.get(number, 0.0) + 1 / len(texts)
    mass = math.fsum(numbers.values())
    return weigh_numbers(numbers), {"mass": mass, "way": "answers", "said": " | ".join(texts)}


def explain_status(status: int | None) -> str | None:
    """What a status means that an endpoint ended with; None without one."""
    known = {401: "the key was refused", 403: "the key may not use it", 404: "no such model there"}
    if status in known:
        return f"{known[status]} ({status})"
    return None if status is None else f"it answers {status} after all retries"


def call_beside_loops(function: Callable[[], Returned]) -> Returned:
    """Call what starts an event loop of its own; where one runs already, in a thread.

    Args:
        function: as in a notebook, whose cells are run by a loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
