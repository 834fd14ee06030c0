from .active import active_interventions, describe_interventions
from .contradictions import ContradictoryInterventionsError
from .fold import FoldError, fold_into_weights
from .from_directions import (
    Units,
    ablate_direction,
    add_direction,
    cap_direction,
)
from .generate import (
    Response,
    ResponseRequest,
    Responses,
    generate_responses,
    stream_responses,
)
from .hooking import intervene
from .intervention import Intervention, MadeFor
from .operators import Ablate, Add, Cap, PerLayer, Replace, Shift
from .other_model import OtherModelError
from .plan import write_sites

__all__ = [
    "Ablate",
    "Add",
    "Cap",
    "ContradictoryInterventionsError",
    "FoldError",
    "Intervention",
    "MadeFor",
    "OtherModelError",
    "PerLayer",
    "Replace",
    "Response",
    "ResponseRequest",
    "Responses",
    "Shift",
    "Units",
    "ablate_direction",
    "active_interventions",
    "add_direction",
    "cap_direction",
    "describe_interventions",
    "fold_into_weights",
    "generate_responses",
    "intervene",
    "stream_responses",
    "write_sites",
]
