"""Half-precision products, widened or not, against float64 and torch's own."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emlens.models import products
from emlens.models.packed_weights import PackedWeights
from emlens.models.products import FEWEST_ROWS, add_product, multiply


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """A processor without half-precision products, and the dtypes that torch was asked for."""
    monkeypatch.setattr(products, "_multiplies", lambda dtype: False)
    seen: list[torch.dtype] = []
    plain = F.linear

    def watched(x: Tensor, *args: Tensor) -> Tensor:
        seen.append(x.dtype)
        return plain(x, *args)

    monkeypatch.setattr(products.F, "linear", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slab", [products.SLAB, 100, 1])
def test_a_widened_product_is_rounded_once(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, slab: int
):
    monkeypatch.setattr(products, "SLAB", slab)
    x, weight, bias = (
        draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(3, 9, 40), (17, 40), (17,)])
    )
    with torch.no_grad():
        for given in (bias, None):
            found = multiply(x, weight, given)
            exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
            assert found.dtype == dtype
            assert found.shape == (3, 9, 17)
            # Half a unit in the last place, and what float32 adds to it.
            step = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-5
            assert bool(((found.double() - exact).abs() <= step).all())
    assert torch.float32 in unable
    assert dtype not in unable


def test_few_rows_and_other_dtypes_are_left_to_torch(unable: list[torch.dtype]):
    weight = draw(5, 8, seed=1)
    with torch.no_grad():
        few = multiply(draw(FEWEST_ROWS - 1, 8, seed=0), weight)
        multiply(draw(64, 8, seed=0, dtype=torch.float32), weight.float())
        multiply(draw(64, 8, seed=0, dtype=torch.float64), weight.double())
    assert unable == [torch.bfloat16, torch.float32, torch.float64]
    assert few.dtype == torch.bfloat16


@pytest.mark.skipif(not products._has_onednn(), reason="this torch has no such product")
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 9), (600,), (1,), (0, 4), ()])
@pytest.mark.parametrize("in_use", [True, False])
def test_float32_is_multiplied_by_onednn(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], in_use: bool
):
    monkeypatch.setattr(products, "LARGE", 40)
    x = draw(*shape, 40, seed=0, dtype=torch.float32)
    weight, bias = (draw(*s, seed=1, dtype=torch.float32) for s in ((17, 40), (17,)))
    with torch.no_grad(), PackedWeights().used() if in_use else nullcontext():
        for given in (bias, None):
            found = multiply(x, weight, given, loose=not in_use)
            exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
            assert (found.dtype, found.shape) == (torch.float32, exact.shape)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        strided = x.t().contiguous().t() if x.ndim == 2 else x
        again = multiply(strided, weight.mT.clone().mT, bias, loose=not in_use)
        torch.testing.assert_close(again, multiply(x, weight, bias, loose=not in_use))
    assert unable == [torch.float64, torch.float64]  # the test's own


@pytest.mark.parametrize("in_use", [True, False])
def test_float32_is_torchs_own_where_inputs_are_long_or_nothing_loose_is_asked(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, in_use: bool
):
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "LONGEST", 39 if in_use else 40)
    x, weight = (draw(*s, 40, seed=0, dtype=torch.float32) for s in ((3,), (17,)))
    with torch.no_grad(), PackedWeights().used() if in_use else nullcontext():
        found = multiply(x, weight, loose=in_use)
    assert unable == [torch.float32]
    assert torch.equal(found, F.linear(x, weight))


def test_without_onednn_torch_multiplies(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    products._has_onednn.cache_clear()
    with torch.no_grad(), PackedWeights().used():
        multiply(draw(3, 8, seed=0).float(), draw(5, 8, seed=1).float())
    products._has_onednn.cache_clear()
    assert unable == [torch.float32]


def test_where_gradients_are_wanted_torch_multiplies(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "LARGE", 1)
    x, weight = draw(32, 8, seed=0), draw(5, 8, seed=1).requires_grad_()
    multiply(x, weight).sum().backward()
    assert unable == [torch.bfloat16]
    assert weight.grad is not None
    trained = draw(5, 8, seed=1, dtype=torch.float32).requires_grad_()
    multiply(x.float(), trained).sum().backward()
    assert unable[1:] == [torch.float32]
    assert trained.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert multiply(x.float(), trained, loose=True).dtype == torch.bfloat16


def test_a_processor_that_multiplies_half_precision_does_so(
    unable: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_multiplies", lambda dtype: True)
    with torch.no_grad():
        multiply(draw(32, 8, seed=0), draw(5, 8, seed=1))
    assert unable == [torch.bfloat16]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_product_is_added(unable: list[torch.dtype], in_place: bool, rows: int):
    y, x, weight = (draw(*s, seed=i) for i, s in enumerate([(rows, 6), (rows, 3), (3, 6)]))
    exact = y.double() + x.double() @ weight.double()
    with torch.no_grad():
        found = add_product(y, x, weight, in_place=in_place)
    assert (found.data_ptr() == y.data_ptr()) == in_place
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=2e-2)


def test_what_torch_does_not_say_it_cannot(monkeypatch: pytest.MonkeyPatch):
    products._multiplies.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert products._multiplies(torch.bfloat16) is False
    products._multiplies.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bias_of_zero_costs_nothing_and_any_other_counts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    monkeypatch.setattr(products, "MANY", 0)
    x, weight, bias = (draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(6, 8), (5, 8), (5,)]))
    zero = torch.zeros_like(bias)
    with torch.no_grad():
        torch.testing.assert_close(multiply(x, weight, zero), multiply(x, weight))
        zero.data[3] = 2.0  # as users set weights: no version tells of it
        changed = multiply(x, weight, zero) - multiply(x, weight)
    assert bool((changed[:, 3] != 0).all())
    assert not bool(changed[:, :3].any())
    trained = torch.zeros_like(bias).requires_grad_()
    multiply(x, weight, trained).sum().backward()
    assert trained.grad is not None
