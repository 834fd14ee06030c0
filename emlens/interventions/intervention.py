"""An intervention as a value: where, what, on which tokens, and for which model it was made."""

from dataclasses import dataclass

from emlens.data import Positions, parse_positions
from emlens.interventions.operators import Operator, PerLayer
from emlens.sites import Site

WRITES = "writes"
"""Every place that writes to the residual stream: embeddings, attention and MLP outputs."""
EVERYWHERE = Positions("all")
"""Every column of every pass, padding included, without asking which token it is."""


@dataclass(frozen=True)
class Intervention:
    """What is done to the values at one site, or at several alike.

    Raises:
        PositionsError: positions that do not follow the grammar.
    """

    site: Site | str
    """A site, a bare stream (`resid_post`: every layer of it), or `writes`."""
    operator: Operator | PerLayer
    positions: Positions | str = EVERYWHERE
    """Named tokens; text is read on construction."""
    made_for: tuple[str, ...] = ()
    """Fingerprints of the models it may be used on; empty for any."""
    label: str = ""
    """How the vector was made, for people."""

    def __post_init__(self) -> None:
        if isinstance(self.positions, str):
            object.__setattr__(self, "positions", parse_positions(self.positions))

    @property
    def where(self) -> Positions:
        """The positions, as they were read."""
        assert isinstance(self.positions, Positions)
        return self.positions
