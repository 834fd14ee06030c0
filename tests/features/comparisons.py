"""Comparisons made up from deltas, for what takes fine-tunes as its unit."""

from typing import Any

import torch

from emlens.features import FeatureDiff, SaeHealth
from emlens.features.results import FEWEST_PROMPTS, is_underpowered


def make_diff(name: str, delta: torch.Tensor, **changed: Any) -> FeatureDiff:
    """A comparison in which every latent fired often enough."""
    d_sae = len(delta)
    nothing = torch.zeros(d_sae, dtype=torch.float64)
    explained = changed.pop("explained", 0.8)
    shared: dict[str, Any] = {
        **{"base": "base", "base_fingerprint": "b", "tuned": name, "tuned_fingerprint": None},
        **{"adapter_fingerprint": f"weights of {name}", "codec": "codec"},
        **{"codec_fingerprint": "c", "site": "resid_post.1", "positions": "all"},
    }
    health = SaeHealth(
        **shared,
        architecture="standard",
        same_base=None,
        streams=("base", "tuned"),
        n_prompts=20,
        n_tokens=torch.tensor([100, 100]),
        explained_variance=torch.tensor([explained, explained]),
        l0=torch.tensor([5.0, 5.0]),
        dead_share=torch.tensor([0.0, 0.0]),
        captured_share=0.5,
        explained_change=None,
        underpowered=is_underpowered(torch.tensor([explained, explained])),
        worse_on_tuned=None,
    )
    fields: dict[str, Any] = shared | {
        **{"tokenizer_fingerprint": "t", "dtype": "float32", "interventions": ()},
        **{"responses": "same", "prompts": ("p", "q"), "n_prompts": 20},
        "n_tokens": torch.tensor([100, 100]),
        **{"mean_base": nothing, "mean_tuned": delta, "delta": delta},
        **{"frequency_base": nothing, "frequency_tuned": nothing},
        "prompts_fired": torch.full((d_sae,), FEWEST_PROMPTS),
        **{"t": delta, "p_value": nothing + 1, "q_value": nothing + 1},
        "p_method": torch.zeros(d_sae, dtype=torch.int8),
        **{"decoder_cosine": nothing, "mean_difference": nothing},
        **{"n_tested": d_sae, "why_untested": ""},
        **{"flips": 10, "seed": 0, "health": health},
    }
    return FeatureDiff(**(fields | changed))
