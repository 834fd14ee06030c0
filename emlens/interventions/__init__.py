"""Interventions: what they are, how they act on a model, and how they become weights.

What needs a model loads the model libraries on first use; the values do not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
