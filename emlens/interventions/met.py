"""Whether interventions met a token of any response of a run that was made in several parts.

`intervene` says so of the passes inside it; here the responses themselves are asked.
"""

from collections.abc import Iterable, Sequence

import torch

from emlens.data import Positions
from emlens.interventions.hooking import PositionsNeverMetError
from emlens.interventions.intervention import EVERYWHERE, Intervention
from emlens.models.tokens_in_flight import frame_prompts, select_positions


def check_met(interventions: Sequence[Intervention], lengths: Iterable[tuple[int, int]]) -> None:
    """Require that the positions of every intervention name a token of some response's passes.

    The last token of a response is chosen and never put through the model.

    Args:
        interventions: those that acted on each of the responses.
        lengths: of each response, the tokens of prompt and response, and those of its prompt.

    Raises:
        PositionsNeverMetError: positions that name no token of any response.
    """
    known = set(lengths)
    for positions in dict.fromkeys(one.where for one in interventions):
        if positions != EVERYWHERE and not any(meets(positions, *each) for each in known):
            raise PositionsNeverMetError(
                f"interventions at the positions {positions} met no token of any response of the "
                "run, so they changed nothing"
            )


def meets(positions: Positions, tokens: int, prompt_tokens: int) -> bool:
    """Whether positions name a token that was read while one response was made.

    Args:
        positions: which tokens.
        tokens: of prompt and response; the last one is chosen and never read.
        prompt_tokens: how many of them are the prompt.
    """
    prompt = frame_prompts(torch.ones((1, prompt_tokens), dtype=torch.int64))
    return bool(select_positions(prompt.at(torch.arange(tokens - 1)[None]), positions).any())
