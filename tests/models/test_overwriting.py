"""Results that nobody has seen are overwritten; whoever has seen one keeps it as it was."""

from typing import Any

import pytest
import torch

from emlens.models import components
from emlens.models.views import lay_views
from tests.models.tiny import TINY, make_ids, make_tiny


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "SMALL", 0)


def values_at(model: Any, modules: list[str]) -> dict[str, torch.Tensor]:
    """What passes some modules in one pass, not copied."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, out: torch.Tensor) -> None:
            kept[name] = out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    model(make_ids(2, 20))
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_overwriting_changes_no_logit(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
):
    model = lay_views(make_tiny(name, dtype=dtype), None)
    with torch.no_grad():
        found = model(make_ids(2, 20))
        monkeypatch.setattr(components, "SMALL", 1 << 40)
        kept = model(make_ids(2, 20))
    # Memory laid out otherwise is added up otherwise.
    assert (kept - found).abs().max() <= 1e-5 * kept.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_what_a_hook_keeps_stays_as_it_was(name: str):
    model: Any = lay_views(make_tiny(name), None)
    block = model.blocks[1]
    inside = [f"blocks.1.{own}" for own, _ in block.named_modules() if own]
    # Whoever listens to scores or pattern gets the stepwise path, whose numbers round otherwise.
    listening = [own for own in inside if not own.endswith(("scores", "pattern", "ln1", "ln2"))]
    listening = [own for own in listening if not own.endswith(("hook_scale", "hook_normalized"))]
    expected = values_at(model, listening)  # gradients are wanted
    with torch.no_grad():
        for own in expected:
            found = values_at(model, [own])[own]
            torch.testing.assert_close(found, expected[own].detach(), rtol=1e-5, atol=1e-6)


def test_something_is_overwritten(monkeypatch: pytest.MonkeyPatch):
    model = lay_views(make_tiny(next(iter(TINY))), None)
    asked: list[bool] = []
    decide = components._is_own
    monkeypatch.setattr(
        components, "_is_own", lambda *told: asked.append(decide(*told)) or asked[-1]
    )
    with torch.no_grad():
        model(make_ids(2, 20))
    assert any(asked)
    asked.clear()
    model(make_ids(2, 20))
    assert not any(asked)
