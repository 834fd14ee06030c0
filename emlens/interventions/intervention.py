"""An intervention as a value: where, what, on which tokens, and for which model it was made."""

from dataclasses import dataclass

from emlens.data import Positions, parse_positions
from emlens.interventions.operators import Operator, PerLayer
from emlens.sites import Site

WRITES = "writes"
"""Every place that writes to the residual stream: embeddings, attention and MLP outputs."""
EVERYWHERE = Positions("all")
"""Every column of every pass, padding included, without asking which token it is."""


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """What a model must agree in with the one that a vector was made from."""

    weights: tuple[str, ...] = ()
    """Fingerprints, any of which will do; `("",)` for weights that nobody knows, which no model
    has. Not compared where there is none."""
    tokenizer: str = ""
    """Fingerprint of vocabulary, special tokens and chat template; not compared where empty."""
    processing: str = ""
    """What was done to the weights after loading; not compared where empty."""


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
    made_for: MadeFor | None = None
    """The models it may be used on; None for any."""
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
