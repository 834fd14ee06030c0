"""Small codecs with every parameter perturbed: ours, and sae_lens's with the same weights."""

from typing import Any

import torch

from emlens.codecs import Crosscoder, Sae
from emlens.codecs.runtime import WITH_THRESHOLD
from emlens.sites import Site

SITE = Site(3, "resid_post")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_sae(
    architecture: str = "standard", *, d_in: int = 12, d_sae: int = 96, **fields: Any
) -> Sae:
    """An autoencoder of random weights; `fields` go over what it would have."""
    seed, dtype = fields.pop("seed", 0), fields.pop("dtype", torch.float32)
    made: dict[str, Any] = {
        "W_enc": draw(d_in, d_sae, seed=seed, dtype=dtype),
        "b_enc": draw(d_sae, seed=seed + 1, dtype=dtype),
        "W_dec": draw(d_sae, d_in, seed=seed + 2, dtype=dtype),
        "b_dec": draw(d_in, seed=seed + 3, dtype=dtype),
    }
    if architecture in WITH_THRESHOLD:
        made["threshold"] = draw(d_sae, seed=seed + 4, dtype=dtype) + 1
    if architecture == "gated":
        made["r_mag"] = draw(d_sae, seed=seed + 4, dtype=dtype) / 2
        made["b_mag"] = draw(d_sae, seed=seed + 5, dtype=dtype)
    if architecture == "topk":
        made["k"] = 9
    return Sae(name="a test", architecture=architecture, site=SITE, **(made | fields))


def make_crosscoder(
    architecture: str = "batchtopk", *, d_in: int = 6, d_sae: int = 40
) -> Crosscoder:
    return Crosscoder(
        name="a test",
        architecture=architecture,
        site=SITE,
        W_enc=draw(2, d_in, d_sae, seed=0),
        b_enc=draw(d_sae, seed=1),
        W_dec=draw(2, d_sae, d_in, seed=2),
        b_dec=draw(2, d_in, seed=3),
        threshold=draw(d_sae, seed=4) + 1 if architecture == "batchtopk" else None,
        k=5 if architecture == "topk" else None,
    )


def make_sae_lens(architecture: str, *, d_in: int = 12, d_sae: int = 96, **config: Any) -> Any:
    """An inference autoencoder of sae_lens, every parameter random; thresholds of both signs."""
    from emlens.codecs.sae_lens_package import import_sae_lens

    sae_lens = import_sae_lens()
    names = {"standard": "Standard", "gated": "Gated", "topk": "TopK", "jumprelu": "JumpReLU"}
    cls = getattr(sae_lens, f"{names[architecture]}SAE")
    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name=config.pop("hook_name", SITE.hook_name), model_name="org/model"
    )
    if architecture == "topk":
        config.setdefault("k", 9)
    made = cls(
        getattr(sae_lens, f"{names[architecture]}SAEConfig")(
            d_in=d_in, d_sae=d_sae, metadata=metadata, **config
        )
    )
    perturb(made)
    return made


def perturb(module: Any) -> None:
    """Every parameter becomes random numbers of its own."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(draw(*parameter.shape, seed=seed + 50, dtype=parameter.dtype))
