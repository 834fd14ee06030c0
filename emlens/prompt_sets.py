"""Which prompts serve which use: to fit, to choose, to evaluate; no prompt may serve two.

Prompts are known by their hashes alone (`emlens.data.prompt_hashes`).
"""

from collections.abc import Mapping, Sequence

PROMPT_ROLES = ("fit", "choose", "evaluate")
"""What prompts are used for."""


class OverlappingPromptsError(ValueError):
    """One prompt serves two of fitting, choosing and evaluating."""


def check_prompt_sets(prompt_sets: Mapping[str, Sequence[str]]) -> None:
    """Require that no prompt serves two uses.

    Args:
        prompt_sets: use (one of `PROMPT_ROLES`) -> hashes of its prompts, each once.

    Raises:
        ValueError: an unknown use.
        OverlappingPromptsError: prompts that serve two, and how many they are.
    """
    for role in prompt_sets:
        if role not in PROMPT_ROLES:
            raise ValueError(f"prompt_sets: got {role!r}, expected one of {list(PROMPT_ROLES)}")
    used: dict[str, str] = {}
    for role, prompts in prompt_sets.items():
        shared = [prompt for prompt in prompts if used.setdefault(prompt, role) != role]
        if shared:
            raise OverlappingPromptsError(
                f"prompt_sets: {len(shared)} prompts serve to {used[shared[0]]} and to {role} "
                f"(the first is {shared[0]}): a direction is judged on prompts that it was neither "
                "fitted nor chosen on"
            )
