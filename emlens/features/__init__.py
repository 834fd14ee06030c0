"""Latents of a sparse codec: what changed, what it means, whether it causes the behaviour."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
