"""An intervention as a value: where, what, on which tokens, and for which model it was made."""

from dataclasses import dataclass, field

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
    adapter: str = ""
    """Fingerprint of the LoRA of the fine-tune; compared with one that is attached, where both are
    known."""
    axes: tuple[str, ...] = ()
    """Of the site that the vector was made at: other sites must have the same, on any model. Not
    compared where there is none."""


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
    """The models and sites it may be used on; None for any."""
    label: str = ""
    """How the vector was made, for people."""
    fit_prompts: tuple[str, ...] = field(default=(), repr=False)
    """Hashes of the prompts that its vector was fitted on; no part of what it does."""

    def __post_init__(self) -> None:
        if isinstance(self.positions, str):
            object.__setattr__(self, "positions", parse_positions(self.positions))

    @property
    def where(self) -> Positions:
        """The positions, as they were read."""
        assert isinstance(self.positions, Positions)
        return self.positions
