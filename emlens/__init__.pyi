from .codecs.load import load_sae
from .data.prompts import load_chats
from .diffing import compare_models
from .directions import fit_directions
from .evaluation import evaluate
from .interventions import ablate_direction, add_direction, intervene
from .interventions.generate import generate_responses
from .models.adapter_files import load_adapter
from .models.loading import load_model
from .models.pair import load_pair
from .reports import write_report
from .results import load_result

__version__: str

__all__ = [
    "__version__",
    "ablate_direction",
    "add_direction",
    "compare_models",
    "evaluate",
    "fit_directions",
    "generate_responses",
    "intervene",
    "load_adapter",
    "load_chats",
    "load_model",
    "load_pair",
    "load_result",
    "load_sae",
    "write_report",
]
