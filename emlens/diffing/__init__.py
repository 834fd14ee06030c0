"""Comparing a base with its fine-tune: activations, outputs, and what chance would do."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
