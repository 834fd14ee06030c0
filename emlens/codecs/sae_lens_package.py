"""The package sae_lens, imported when it is needed and not before: it takes seconds."""

import warnings
from types import ModuleType

from emlens.codecs.codec import CodecError


def import_sae_lens() -> ModuleType:
    """Import sae_lens.

    Raises:
        CodecError: it is not installed.
    """
    with warnings.catch_warnings():
        # It asks for a module of TransformerLens by its older name.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import sae_lens
        except ModuleNotFoundError as error:
            raise CodecError(
                f"{error.name} is not installed, which this needs: pip install 'emlens-interp[sae]'"
            ) from error
    return sae_lens
