"""The model libraries' own bars and notices, switched off: for programs that print their own.

Not called by the library itself: in a notebook the host libraries' output is the user's choice.
"""

import logging
import warnings


def quiet_host_libraries() -> None:
    """Silence loading bars, advice and deprecation notices for the rest of the process."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
