"""Decoding under interventions: what do an ablation at every write and nine adapters cost?

Bound: the same decoding with neither, 32 greedy tokens after a prompt of 32.
Beside it: the same two changes as plain torch hooks on the Hugging Face modules, written out here,
under Hugging Face's own generate; and through nnsight, where it is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import make_cases
from benchmarks.decode import BATCHES, NEW, PROMPT, generate_ours
from benchmarks.models import describe_model, draw_ids, load_hugging_face, load_tokenizer
from benchmarks.nnsight_peer import decode_ablated, decode_adapted, trace_model
from benchmarks.peers import find_peers, generate_hugging_face
from benchmarks.records import Figure, Record
from benchmarks.reference import check_logits, check_tokens
from benchmarks.rows import run_alone
from benchmarks.settings import Settings
from benchmarks.timing import PeerLeftOutError, Timings, time_sides
from benchmarks.work import Work, count_decode
from emlens.interventions import Ablate, Intervention, intervene
from emlens.models.attach import attach_adapter
from emlens.models.lora import LoraAdapter
from emlens.models.views import lay_views

CHANGES = ("ablate", "adapters")
SIDES = ("plain", *CHANGES, *(f"hooked_{change}" for change in CHANGES))
NNSIGHT = tuple(f"nnsight_{change}" for change in CHANGES)
AIM = 1.05
"""Of the time of decoding with neither."""


def measure(settings: Settings) -> Record:
    """Time all sides on the same prompts, in each dtype and batch."""
    n = NEW[settings.size]
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    batches = settings.batches(BATCHES[settings.size])
    sizes: dict[str, Any] = {"prompt": PROMPT, "new": n, "batch": batches}
    work: dict[str, Work] = {}
    notes: list[str] = []
    for dtype in settings.dtypes:
        hf = load_hugging_face(dtype, settings)
        sizes |= describe_model(hf)
        makers = {side: make_side(side, hf, settings) for side in SIDES}
        makers |= find_peers(
            {side: partial(make_side, side, hf, settings) for side in NNSIGHT}, notes
        )
        for batch in batches:
            ids = draw_ids(hf, batch, PROMPT)
            sides = {side: make(ids, n) for side, make in makers.items()}
            _check(sides, hf, ids, settings, notes)
            timings = time_sides(
                sides,
                rounds=settings.rounds,
                device=settings.device,
                clock=settings.read_clock,
                notes=notes,
            )
            figures += _compare(timings, dtype, batch, settings)
            for side in timings.seconds:
                seconds[f"batch {batch}, {dtype}: {side}"] = timings.median(side)
            work[f"batch {batch}, {dtype}: plain"] = count_decode(hf, batch, PROMPT, n)
    return Record(
        row="decode_intervened",
        settings=settings,
        sizes=sizes,
        figures=figures,
        headline={
            f"{change}_over_decode": f"batch {batches[0]}: {change} over decode"
            for change in CHANGES
        },
        seconds=seconds,
        work=work,
        peak_sides=SIDES,
        notes=tuple(dict.fromkeys(notes)),
    )


def make_side(side: str, hf: Any, settings: Settings) -> Callable[[Tensor, int], Callable]:
    """Build one side's model; returns ids, n -> a call that decodes n tokens [batch n]."""
    direction = draw_direction(hf)
    adapter = make_cases(hf, settings)[1].adapter
    if side in NNSIGHT:
        traced = trace_model(hf, load_tokenizer(settings))
        if side == "nnsight_ablate":
            return lambda ids, n: decode_ablated(traced, hf, ids, n, direction)
        return lambda ids, n: decode_adapted(traced, hf, ids, n, adapter)
    if side == "hooked_ablate":
        return lambda ids, n: _hooked(hf, ids, n, lambda: ablate_by_hooks(hf, direction))
    if side == "hooked_adapters":
        return lambda ids, n: _hooked(hf, ids, n, lambda: adapt_by_hooks(hf, adapter))
    model, acts = make_ours(side, hf, settings)

    def make(ids: Tensor, n: int) -> Callable[[], Tensor]:
        def decode() -> Tensor:
            with intervene(model, acts):
                return generate_ours(model, ids, n)

        return decode

    return make


def make_ours(side: str, hf: Any, settings: Settings) -> tuple[Any, tuple[Intervention, ...]]:
    """Our model of a side, and what acts on it."""
    views = lay_views(hf, None)
    if side == "adapters":
        return attach_adapter(views, make_cases(hf, settings)[1].adapter), ()
    return views, (Intervention("writes", Ablate(draw_direction(hf))),) * (side == "ablate")


def draw_direction(hf: Any) -> Tensor:
    """A unit vector of the model's width."""
    vector = torch.randn(hf.config.hidden_size, generator=torch.Generator().manual_seed(4))
    return vector / vector.norm()


def _hooked(
    hf: Any, ids: Tensor, n: int, hooks: Callable[[], AbstractContextManager[None]]
) -> Callable[[], Tensor]:
    generate = generate_hugging_face(hf, ids, n)

    def decode() -> Tensor:
        with hooks():
            return generate()

    return decode


@contextmanager
def ablate_by_hooks(hf: Any, direction: Tensor) -> Iterator[None]:
    """Take a direction out of every write of a Llama or Qwen2, the way it is usually written."""
    d = direction.to(hf.device, hf.dtype)

    def ablate(_module: Any, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        along = d.to(first.dtype)
        first = first - (first @ along)[..., None] * along
        return (first, *output[1:]) if isinstance(output, tuple) else first

    writes = [hf.model.embed_tokens]
    writes += [part for layer in hf.model.layers for part in (layer.self_attn, layer.mlp)]
    with ExitStack() as stack:
        for module in writes:
            stack.callback(module.register_forward_hook(ablate).remove)
        yield


@contextmanager
def adapt_by_hooks(hf: Any, adapter: LoraAdapter) -> Iterator[None]:
    """Add scale * B A x to the output of each adapted module."""
    with ExitStack() as stack:
        for name, lora in adapter.modules.items():

            def adapt(_module: Any, args: Any, output: Tensor, lora: Any = lora) -> Tensor:
                A, B = lora.A.to(output.dtype), lora.B.to(output.dtype)
                return output + lora.scale * (args[0] @ A.mT @ B.mT)

            handle = hf.get_submodule(name).register_forward_hook(adapt)
            stack.callback(handle.remove)
        yield


@torch.inference_mode()
def _check(
    sides: dict[str, Callable], hf: Any, ids: Tensor, settings: Settings, notes: list[str]
) -> None:
    """Both ways of one change give the same logits and tokens, and other logits than without.

    A side of nnsight in which nnsight itself fails is taken out, and noted.
    """
    plain = lay_views(hf, None)(ids)
    changes = {
        "ablate": lambda: ablate_by_hooks(hf, draw_direction(hf)),
        "adapters": lambda: adapt_by_hooks(hf, make_cases(hf, settings)[1].adapter),
    }
    for side, hooks in changes.items():
        model, acts = make_ours(side, hf, settings)
        with hooks(), intervene(model, acts):
            logits = model(ids)
            check_logits(logits, hf, ids, what=side)
        if float((logits - plain).abs().max() / plain.abs().max()) < 1e-3:
            raise AssertionError(f"{side}: the logits hardly change; timing it says nothing")
        ours = sides[side]()
        for peer in (f"hooked_{side}", f"nnsight_{side}"):
            if peer not in sides:
                continue
            try:
                theirs = sides[peer]()
            except PeerLeftOutError as error:
                notes.append(f"{peer}: {error}")
                del sides[peer]
                continue
            with hooks():
                check_tokens(ours, theirs, hf, ids)


def _compare(timings: Timings, dtype: str, batch: int, settings: Settings) -> list[Figure]:
    figures = []
    peers = {"torch hooks on huggingface": "hooked", "nnsight": "nnsight"}
    for side in CHANGES:
        figures.append(
            Figure(
                name=f"batch {batch}: {side} over decode",
                dtype=dtype,
                ratio=timings.cost(side, "plain"),
                better="lower",
                aim=settings.aim(AIM),
            )
        )
        figures += [
            Figure(
                name=f"batch {batch}: {side} vs {peer}",
                dtype=dtype,
                ratio=timings.speed(side, f"{prefix}_{side}"),
                better="higher",
            )
            for peer, prefix in peers.items()
            if f"{prefix}_{side}" in timings.seconds
        ]
    return figures


def steps(side: str, dtype: str, settings: Settings) -> Iterator[dict[str, int]]:
    """Load, then decode the most rows that are timed, pausing for the memory to be read."""
    hf = load_hugging_face(dtype, settings)
    batch = max(settings.batches(BATCHES[settings.size]))
    decode = make_side(side, hf, settings)(draw_ids(hf, batch, PROMPT), NEW[settings.size])
    yield {}
    decode()
    yield {}


if __name__ == "__main__":
    run_alone(measure)
