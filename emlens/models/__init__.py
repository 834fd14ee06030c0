"""Models: loading, adapters and their proof, the paired forward, decoding, export.

The only package that imports transformer_lens, transformers and peft; they load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
