"""SAE diff: what does all that is counted of two models' latents cost beside encoding them?

Bound: the encoder's bare matrix multiply, [n d_in] x [d_in d_sae] for each model, chunk by chunk,
by `products.multiply` as codecs ask for it, the fastest that we know; torch's own product is timed
beside it. Counted
are codes, firings, activations, what is reconstructed, and what the difference of the
reconstructions captures, prompt by prompt.
Beside it: sae_lens, which encodes all rows of a model at once, decodes, and takes means of the
dense codes.

At full size the peak memory of four times as many tokens is measured too, which should not grow,
and the time of twice as many latents, which should double.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import measure_residence
from benchmarks.models import LARGE
from benchmarks.peers import find_peers
from benchmarks.records import Figure, Record
from benchmarks.rows import run_alone
from benchmarks.settings import DTYPES, Settings
from benchmarks.timing import PeerLeftOutError, single_ratio, time_sides
from benchmarks.work import Work
from emlens.codecs import CodecError, Sae
from emlens.codecs.sae_lens_package import import_sae_lens
from emlens.features.accumulate import FeatureAccumulator
from emlens.features.encode import split_rows
from emlens.features.reading import count_rows
from emlens.models.products import multiply
from emlens.sites import Site

AIM = 1.15
MEMORY_AIM = 1.02
DOUBLE_AIM = 2.1
SIZES = {"toy": (64, 1024), "full": (576, 16384)}
"""d_in and d_sae: those of SmolLM2 at full size."""
D_SAE_GPU = 131_072
"""On a GPU at full size, as wide as the model of that shape."""
PROMPTS = {"toy": (4, 16), "full": (16, 64)}
"""Prompts, and tokens of each."""
L0 = {"toy": 16, "full": 32}
"""Latents active at a token; at full size about as many as in codecs trained with k 32."""
CLOSE = 1e-5
"""Share of a threshold that float32 may err by."""
BATCHES = {"emlens": 1, "few": 2, "many": 8}
"""Batches of prompts that a process counts; from the second on the peak should be the same."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A codec and the activations of two models."""

    codec: Sae
    x: Tensor  # [2 n d_in]
    prompts: Tensor  # [n]
    n_prompts: int


def measure(settings: Settings) -> Record:
    """Time the sums, the bare multiplication and the peer, for activations of each dtype."""
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    work: dict[str, Work] = {}
    notes: list[str] = []
    for dtype in settings.dtypes:
        figures += _measure_memory(dtype, settings)  # before anything lies in the memory
        bench = make_bench(dtype, settings)
        twice = make_bench(dtype, settings, d_sae=2 * size_codec(settings)[1])
        check_sums(count(bench), bench)
        sides: dict[str, Callable[[], object]] = {
            "emlens": lambda b=bench: count(b),
            "multiply": make_multiplication(bench, partial(multiply, loose=True)),
            "torch's product": make_multiplication(bench, torch.nn.functional.linear),
            "twice the latents": lambda b=twice: count(b),
        }
        sides |= find_peers({"sae_lens": lambda b=bench: make_peer(b)}, notes)
        timings = time_sides(
            sides, rounds=settings.rounds, device=settings.device, clock=settings.read_clock
        )
        costs = (
            ("all sums / multiplication", "multiply", "emlens", AIM),
            ("all sums / torch's multiplication", "torch's product", "emlens", None),
            ("twice the latents / once", "emlens", "twice the latents", DOUBLE_AIM),
        )
        figures += [
            Figure(
                name=name,
                dtype=dtype,
                ratio=timings.cost(side, over),
                better="lower",
                aim=None if aim is None else settings.aim(aim),
            )
            for name, over, side, aim in costs
        ]
        if "sae_lens" in timings.seconds:
            ratio = timings.speed("emlens", "sae_lens")
            figures.append(Figure(name="vs_sae_lens", dtype=dtype, ratio=ratio, better="higher"))
        seconds |= {f"{dtype}: {side}": timings.median(side) for side in timings.seconds}
        d_in, d_sae = bench.codec.W_enc.shape
        flops = 2 * bench.x[..., 0].numel() * d_in * d_sae
        work[f"{dtype}: multiply"] = Work(flops=flops, bytes=4 * d_in * d_sae)
    d_in, d_sae = size_codec(settings)
    sizes = {"d_in": d_in, "d_sae": d_sae, "l0": L0[settings.size]}
    sizes |= dict(zip(("prompts", "tokens"), PROMPTS[settings.size], strict=True))
    return Record(
        row="sae_diff",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={"over_multiplication": "all sums / multiplication"},
        seconds=seconds,
        work=work,
        notes=tuple(dict.fromkeys(notes)),
        peak_sides=("emlens", "sae_lens"),
    )


def size_codec(settings: Settings) -> tuple[int, int]:
    """d_in and d_sae of the codec that is timed."""
    if settings.full and settings.device != "cpu":
        return LARGE[settings.shape].hidden_size, D_SAE_GPU
    return SIZES[settings.size]


def make_bench(dtype: str, settings: Settings, *, d_sae: int | None = None) -> Bench:
    """Random activations, and a JumpReLU codec of random weights of which so many fire a token.

    The codec computes in float32, whatever the model runs in.
    """
    generator = torch.Generator().manual_seed(0)
    (d_in, usual), (n_prompts, n) = size_codec(settings), PROMPTS[settings.size]
    d_sae = d_sae or usual

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(settings.device)

    W_enc = draw(d_in, d_sae) / d_in**0.5
    x = draw(1, n_prompts * n, d_in) + torch.stack([draw(n_prompts * n, d_in) for _ in range(2)])
    b_enc, b_dec = 0.1 * draw(d_sae), 0.1 * draw(d_in)
    some = (x[0, :64] - b_dec) @ W_enc + b_enc
    level = some.flatten().sort().values[-L0[settings.size] * len(some)]
    codec = Sae(
        name="random",
        architecture="jumprelu",
        site=Site(0, "resid_post"),
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_enc.mT.contiguous(),
        b_dec=b_dec,
        threshold=level * (1 + 0.05 * draw(d_sae)),  # another one for each latent
    )
    prompts = torch.arange(n_prompts).repeat_interleave(n)
    return Bench(codec=codec, x=x.to(DTYPES[dtype]), prompts=prompts, n_prompts=n_prompts)


def make_sums(bench: Bench) -> FeatureAccumulator:
    """Sums of nothing yet."""
    d_in, d_sae = bench.codec.W_enc.shape
    return FeatureAccumulator(2, n_prompts=bench.n_prompts, d_in=d_in, d_sae=d_sae)


def count(bench: Bench) -> FeatureAccumulator:
    """What is measured: all that a comparison does with the activations of a batch."""
    found = make_sums(bench)
    count_rows(found, bench.codec, prompts=bench.prompts, x=bench.x)
    return found


def make_multiplication(
    bench: Bench, product: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """The encoder's multiplication of both models' rows and nothing else."""
    weight = bench.codec.W_enc
    parts = list(split_rows(bench.x.shape[1], weight.shape[1], device=weight.device.type))

    @torch.inference_mode()
    def run() -> None:
        for rows in bench.x:
            for part in parts:
                product(rows[part].to(weight.dtype), weight.mT)

    return run


def check_sums(found: FeatureAccumulator, bench: Bench) -> None:
    """Require the sums of codes and firings that dense codes in float64 give.

    Raises:
        AssertionError: the sums that are about to be timed are other ones.
    """
    codec = bench.codec
    assert codec.threshold is not None
    for model, rows in zip(found.models, bench.x, strict=True):
        sums = model.result()
        pre = (rows.double() - codec.b_dec.double()) @ codec.W_enc.double() + codec.b_enc.double()
        codes = (pre * (pre > codec.threshold)).cpu()
        # A code within rounding of its threshold is there or not.
        close = ((pre / codec.threshold - 1).abs() < CLOSE).cpu().double()
        dense, expected, unsure = torch.zeros(
            3, bench.n_prompts, codec.d_sae, dtype=torch.float64
        ).unbind()
        dense[sums.prompts, sums.latents] = sums.codes
        expected.index_add_(0, bench.prompts, codes)
        unsure.index_add_(0, bench.prompts, close)
        sure = unsure == 0
        gap = float((dense - expected)[sure].norm() / expected.norm())
        if not (gap <= 1e-5 and float(sure.double().mean()) > 0.999):
            raise AssertionError(
                f"sums of codes differ by {gap:.2g} of their norm, at most 1e-5, or too few of "
                f"them are sure: {float(sure.double().mean()):.5f}"
            )
        rebuilt = codes.float().to(rows.device) @ codec.W_dec + codec.b_dec
        missed = (rows.double() - rebuilt.double()).square().sum()
        gap = abs(float(sums.missed.sum() / missed.cpu()) - 1)
        if not gap <= 1e-3:
            raise AssertionError(f"what is not reconstructed differs by {gap:.2g}, at most 1e-3")


def make_peer(bench: Bench) -> Callable[[], list[Tensor]]:
    """Dense codes by sae_lens, decoded and averaged; its codes are checked by ours."""
    sae = _load_peer(bench.codec)
    x = bench.x.float()
    ours, theirs = bench.codec.encode(x[0, :64]).values, sae.encode(x[0, :64])
    gap = float((ours - theirs).norm() / ours.norm())
    if not gap <= 1e-3:
        raise AssertionError(f"codes of sae_lens differ by {gap:.2g} of their norm, at most 1e-3")
    return lambda: reduce_dense(sae, x, bench.n_prompts)


@torch.no_grad()
def reduce_dense(sae: Any, x: Tensor, n_prompts: int) -> list[Tensor]:
    """Means by prompt, frequencies, missed squares and the captured change, the usual way."""
    found, rebuilt = [], []
    for rows in x:
        codes = sae.encode(rows)
        rebuilt.append(sae.decode(codes))
        found += [codes.unflatten(0, (n_prompts, -1)).mean(1), (codes > 0).float().mean(0)]
        found.append((rows - rebuilt[-1]).square().sum(1))
    found.append((x[1] - x[0] - (rebuilt[1] - rebuilt[0])).square().sum(1))
    return found


def _load_peer(codec: Sae) -> Any:
    try:
        sae_lens = import_sae_lens()
    except CodecError as error:
        raise PeerLeftOutError(f"sae_lens is left out: {error}") from error
    config = sae_lens.JumpReLUSAEConfig(d_in=codec.d_in, d_sae=codec.d_sae)
    sae = sae_lens.JumpReLUSAE(config).to(codec.W_enc.device)
    weights = {n: getattr(codec, n) for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    sae.load_state_dict(weights)
    return sae.eval().requires_grad_(False)


def _measure_memory(dtype: str, settings: Settings) -> list[Figure]:
    if not settings.full:
        return []
    # Mapped, as what the heap keeps differs by 3 % from run to run.
    few, many = (
        measure_residence("sae_diff", side, dtype, settings, mapped=True).peaks[-1]
        for side in ("few", "many")
    )
    return [
        Figure(
            name="peak bytes, four times the tokens / once",
            dtype=dtype,
            ratio=single_ratio(many / few),
            better="lower",
            aim=MEMORY_AIM,
        )
    ]


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then count once; ``few`` and ``many`` count several batches of the same prompts."""
    bench = make_bench(dtype, settings)
    if side == "sae_lens":
        reduce = make_peer(bench)
        yield {}
        reduce()
    else:
        found = make_sums(bench)
        yield {}
        for _ in range(BATCHES[side]):
            count_rows(found, bench.codec, prompts=bench.prompts, x=bench.x)
    yield {}


if __name__ == "__main__":
    run_alone(measure)
