"""The tokenizer of SmolLM2-135M-Instruct, as the package has it."""

from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from emlens.models.checkpoints import dequantise_gguf, load_tokenizer
from emlens.sources import SourceError, shipped_path


@cache
def load_smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """From the folder of the dequantised weights: to read it out of the GGUF file takes seconds."""
    try:
        file = shipped_path("smollm2")
    except SourceError as error:
        pytest.skip(str(error))
    return load_tokenizer(dequantise_gguf(file))
