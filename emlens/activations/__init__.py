"""Activations of chats: statistics of a stream, or the values themselves in shards on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
