"""Whole numbers that depend on the kind of device, such as how many rows to take at a time.

Not for what depends on how much memory a device has.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ByDevice:
    """One number for processors, another for whatever else.

    A processor wants pieces that its cache holds. An accelerator has no such cache, pays for each
    launch and for each time that the host waits, and wants few large pieces.
    """

    cpu: int
    elsewhere: int

    def of(self, device: torch.device | str) -> int:
        """The number for a device, or for its kind, such as `cuda`."""
        return self.cpu if torch.device(device).type == "cpu" else self.elsewhere
