"""Directions: fitted between texts or models, compared beside chance, drawn at random."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
