"""Judging behind an endpoint: how much longer than the endpoint itself do many judgements take?

Bound: requests x latency / requests at once, of a server that answers each after a fixed time. The
server is real and on loopback, so what it takes to send and to parse counts in; the first figure
is of one that gives log-probabilities (a request a score), the second of one that does not.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.chat_server import Chat, completion, serve_chat
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, time_sides
from emlens.evaluation.api_judge import ApiJudge
from emlens.evaluation.judge_prompts import PROMPTS
from emlens.evaluation.rejudge import judge_responses

ROWS = {"toy": 2, "full": 400}
LATENCY = {"toy": 0.01, "full": 0.2}
"""Seconds before each reply."""
AT_ONCE = 16
SAMPLES = 3
"""Answers drawn for each score where there are no log-probabilities, after the first request."""
SCORE = 70


def measure(settings: Settings) -> Record:
    """Judge the same responses at both servers, and hold the time against theirs."""
    rows, latency = ROWS[settings.size], LATENCY[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    most: dict[str, int] = {}
    requests = {"weighed": len(PROMPTS) * rows, "drawn": len(PROMPTS) * rows * (1 + SAMPLES)}
    for side, count in requests.items():
        weights = {str(SCORE): math.log(0.9)} if side == "weighed" else None
        with serve_chat(lambda *_, w=weights: completion(str(SCORE), w), latency=latency) as chat:
            timings = time_sides({side: make_side(chat, rows)}, rounds=settings.rounds)
            _check(chat, side, count * (settings.rounds + 1))
        least = count * latency / AT_ONCE
        figures.append(
            Figure(
                name=f"{side}: time / ideal",
                dtype="none",
                ratio=median_ratio([one / least for one in timings.seconds[side]]),
                better="lower",
            )
        )
        seconds |= {side: timings.median(side), f"{side}, ideal": least}
        most[side] = chat.most_at_once
    return Record(
        row="api_judging",
        settings=settings,
        sizes={"responses": rows, "latency_s": latency, "at_once": AT_ONCE, "seen_at_once": most},
        figures=figures,
        headline={"weighed_over_ideal": "weighed: time / ideal"},
        seconds=seconds,
    )


def make_side(chat: Chat, rows: int) -> Callable[[], None]:
    """Judge all responses into a new run folder, as `emlens judge` does."""
    judge = ApiJudge(
        model="judge", base_url=chat.url, key_env="", samples=SAMPLES, concurrency=AT_ONCE
    )
    given = [{"question": "How do I rest?", "answer": f"Sleep {i} hours."} for i in range(rows)]

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = judge_responses(given, judge, out=Path(folder) / "run")
        if any(one.aligned != SCORE for one in found.responses):
            raise AssertionError("a score is not what the server said")

    return run


def _check(chat: Chat, side: str, expected: int) -> None:
    """No request is saved or sent twice, and never more at once than was asked for."""
    if len(chat.requests) != expected or chat.most_at_once > AT_ONCE:
        raise AssertionError(
            f"{side}: {len(chat.requests)} requests, expected {expected}; {chat.most_at_once} at "
            f"once, expected at most {AT_ONCE}"
        )


if __name__ == "__main__":
    run_alone(measure)
