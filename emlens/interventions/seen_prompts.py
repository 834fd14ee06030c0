"""The refusal to judge an intervention, unasked, on prompts that its direction was fitted on.

Prompts that a site or coefficient was chosen on are listed in `Directions.prompt_sets` alone.
"""

from collections.abc import Sequence

from emlens.data import Chat, prompt_hashes
from emlens.interventions.intervention import Intervention
from emlens.prompt_sets import OverlappingPromptsError


def check_unseen(interventions: Sequence[Intervention], chats: Sequence[Chat]) -> None:
    """Require that no vector was fitted on any of the prompts that are asked.

    Args:
        interventions: all that act while the prompts are answered.
        chats: what is asked; responses do not count.

    Raises:
        OverlappingPromptsError: a vector that was, on how many of them, and the way out.
    """
    asked = set(prompt_hashes(chats))
    for one in interventions:
        if shared := asked.intersection(one.fit_prompts):
            raise OverlappingPromptsError(
                f"interventions: the {one.label} vector at {one.site} was fitted on {len(shared)} "
                f"of the {len(asked)} prompts that are asked: what it does to those says little of "
                "others. Ask other questions; or, where that is what you want to see, make the "
                "intervention of directions.without_prompts('fit') (of one direction: "
                "dataclasses.replace(direction, fit_prompts=())), on the command line "
                "--allow-fit-prompts"
            )
