"""What changes a model's activations for a while and would be lost where its weights are taken.

For those who write weights; how interventions are recorded beside results is `acting`.
"""

from typing import Any

from emlens.models.acting import describe_acting
from emlens.models.identity import foreign_hooks


def name_changes(model: Any) -> str | None:
    """Say what acts on a model right now beside weights and adapter, where, and how to end it.

    None where nothing does.
    """
    acting = [str(one.get("site", "an unnamed site")) for one in describe_acting(model)]
    if acting:
        named = ", ".join(list(dict.fromkeys(acting))[:3])
        return f"interventions act on it at {named}; leave the `with intervene(...)` first"
    if hooked := list(foreign_hooks(model)):
        return (
            f"hooks that are no Interventions sit on it at {', '.join(hooked[:3])}; remove them "
            "(reset_hooks, or their handles) first"
        )
    return None
