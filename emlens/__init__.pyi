from .data.prompts import load_chats
from .diffing import compare_models
from .models.adapter_files import load_adapter
from .models.loading import load_model
from .models.pair import load_pair
from .reports import write_report
from .results import load_result

__version__: str

__all__ = [
    "__version__",
    "compare_models",
    "load_adapter",
    "load_chats",
    "load_model",
    "load_pair",
    "load_result",
    "write_report",
]
