"""See what a fine-tune changed inside a language model: load, prove, compare, show.

The names below are imported when they are first used, so that `import emlens` costs nothing.
What belongs to one stage only stays in its package (`emlens.models`, `emlens.diffing`, ...).
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
