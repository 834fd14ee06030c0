"""Watching hook points for the length of a context, with proof that each one fired.

For reading only: interventions are values of their own, applied by the interventions package.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformer_lens import HookedTransformer

from emlens.sites import Site, check_sites

Watcher = Callable[[Site, Tensor], None]


class HookNeverFiredError(RuntimeError):
    """A watched hook point was never reached."""


@contextmanager
def watch_sites(
    model: HookedTransformer, sites: Sequence[Site], watcher: Watcher
) -> Iterator[Counter[Site]]:
    """Call ``watcher(site, activation)`` once a forward pass for each site, in the model's order.

    Args:
        model: a model loaded by emlens.
        sites: the places to read; each must exist in the model.
        watcher: sees the activation after every hook registered before this call.

    Yields:
        How often each site has been read.

    Raises:
        SiteError: a site the model does not have.
        HookNeverFiredError: on a clean exit, a site that was never reached.
    """
    check_sites(sites, model.hook_dict)
    firings: Counter[Site] = Counter()
    with ExitStack() as stack:
        for site in sites:
            point = model.hook_dict[site.hook_name]
            # The host's block normalises its input three times, for queries, keys and values.
            repeats = 3 if site.stream.startswith("ln1_") and "post" not in site.stream else 1
            seen = _Seen(site, watcher, firings, repeats)
            stack.callback(point.register_forward_hook(seen).remove)
        yield firings
    silent = [str(site) for site in sites if not firings[site]]
    if silent:
        raise HookNeverFiredError(
            f"sites never reached: {', '.join(silent[:5])}; the forward pass stopped before them "
            "or the model does not use them"
        )


class _Seen:
    """A torch hook that reports every ``repeats``-th call, counting from the first."""

    def __init__(self, site: Site, watcher: Watcher, firings: Counter[Site], repeats: int):
        self.site, self.watcher, self.firings, self.repeats = site, watcher, firings, repeats
        self.calls = 0

    def __call__(self, _module: object, _args: object, output: Tensor) -> None:
        first = self.calls % self.repeats == 0
        self.calls += 1
        if first:
            self.firings[self.site] += 1
            self.watcher(self.site, output)
