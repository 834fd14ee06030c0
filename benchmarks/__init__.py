"""How fast and how large: one question per file, each beside its bound and its peers.

Not part of the package: run from a checkout, ``python -m benchmarks --suite cpu --size toy``.
"""
