"""Rearranged weights: the same products, each weight once, no more than there is room for."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emlens.models import packed_weights, products
from emlens.models.packed_weights import PackedWeights, packed_weights_in_use
from emlens.models.products import multiply, multiply_together

pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="this torch has no such product")
D_IN = 64


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that each weight was rearranged for, small weights included."""
    monkeypatch.setattr(products, "LARGE", 1)
    rows: list[int] = []
    plain = packed_weights._rearrange

    def watched(weight: Tensor, n: int) -> Tensor:
        rows.append(n)
        return plain(weight, n)

    monkeypatch.setattr(packed_weights, "_rearrange", watched)
    return rows


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_other_numbers_of_rows_stay_right(packed: list[int], dtype: torch.dtype):
    if dtype == torch.bfloat16 and not products._multiplies(dtype):
        pytest.skip("this processor does not multiply bfloat16")
    weight, bias = draw(48, D_IN).to(dtype), draw(48, seed=1).to(dtype)
    with torch.no_grad(), PackedWeights().used():
        for rows in (32, 1, 7, 600):
            x = draw(rows, D_IN, seed=rows).to(dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(
                multiply(x, weight, bias).double(), exact, rtol=near, atol=near
            )
    assert packed == [32]


def test_views_of_one_storage_are_told_apart(packed: list[int]):
    both, x = draw(D_IN, D_IN), draw(3, D_IN, seed=1)
    with torch.no_grad(), PackedWeights().used():
        for weight in (both, both.mT, both[:32], both):
            torch.testing.assert_close(multiply(x, weight), x @ weight.mT, rtol=1e-5, atol=1e-5)
    assert len(packed) == 3


def test_a_weight_that_comes_where_another_lay_is_not_taken_for_it(packed: list[int]):
    x = draw(2, D_IN)
    with torch.no_grad(), PackedWeights().used():
        for seed in range(20):
            weight = draw(16, D_IN, seed=seed)
            torch.testing.assert_close(multiply(x, weight), x @ weight.mT, rtol=1e-5, atol=1e-5)
    assert len(packed) == 20


def test_what_there_is_no_room_for_stays_as_it_is(packed: list[int]):
    first, second, x = draw(16, D_IN), draw(16, D_IN, seed=1), draw(2, D_IN, seed=2)
    with torch.no_grad(), PackedWeights(room=first.nbytes).used():
        for weight in (first, second, first, second):
            torch.testing.assert_close(multiply(x, weight), x @ weight.mT, rtol=1e-5, atol=1e-5)
    assert len(packed) == 1


def test_the_outermost_are_used_and_then_none(packed: list[int]):
    weight, x = draw(16, D_IN), draw(2, D_IN)
    outer = PackedWeights()
    with torch.no_grad(), outer.used():
        for _ in range(2):
            with PackedWeights().used():
                assert packed_weights_in_use() is outer
                multiply(x, weight)
    assert packed_weights_in_use() is None
    with torch.no_grad():
        multiply(x, weight)
    assert len(packed) == 1
    gone = weakref.ref(weight)
    del outer, weight
    gc.collect()
    assert gone() is None


def test_temporary_float32_forms_of_weights_are_not_kept(
    packed: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_multiplies", lambda dtype: False)
    with torch.no_grad(), PackedWeights().used():
        multiply(draw(32, D_IN).bfloat16(), draw(16, D_IN).bfloat16())
    assert packed == []


@pytest.mark.parametrize("room", [1 << 30, 40 * 4 * D_IN])
def test_products_of_one_input_are_made_together_where_there_is_room(packed: list[int], room: int):
    weights = [draw(48, D_IN), draw(24, D_IN, seed=1), draw(16, D_IN, seed=2)]
    biases = [draw(len(weight), seed=3 + len(weight)) for weight in weights]
    x = draw(2, 3, D_IN, seed=4)
    with torch.no_grad(), PackedWeights(room=room).used():
        for _ in range(2):
            found = multiply_together(x, weights, biases)
            for out, weight, bias in zip(found, weights, biases, strict=True):
                exact = F.linear(x.double(), weight.double(), bias.double())
                torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    # Where all do not fit together, those that fit alone are rearranged: the second and the third.
    assert len(packed) == (1 if room > 40 * 4 * D_IN else 2)


def test_without_rearranged_weights_each_product_is_its_own(packed: list[int]):
    weights, x = [draw(8, D_IN), draw(4, D_IN, seed=1)], draw(2, D_IN, seed=2)
    with torch.no_grad():
        found = multiply_together(x, weights, [torch.zeros(8), torch.ones(4)])
    torch.testing.assert_close(found[1], x @ weights[1].mT + 1, rtol=1e-5, atol=1e-5)
    assert packed == []
    assert all(out.is_contiguous() for out in found)
