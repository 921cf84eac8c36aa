"""`lora_linear` in bfloat16 where torch makes the base product: on processors with bfloat16 dot products."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import ztok_fast
from ztok_fast import native, ops
from ztok_fast.ops.lora.lora_linear import LORA_LINEAR, adapter_of_rows, check, make
from ztok_fast.ops.spec import close

NATIVE = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SIZES = {"M": 130, "in": 400, "out": 500, "r": 17, "n": 3, "bias": True, "by_row": True}
pytestmark = pytest.mark.skipif(not native.status("cpu").available, reason="the compiled CPU library is missing")
AVX2, AVX512 = 1, 2


@pytest.fixture(autouse=True)
def forced():
    with ztok_fast.backend("cpp"):
        yield


def arguments(dtype=torch.bfloat16, **changed):
    return make(SIZES | changed, dtype, torch.Generator().manual_seed(0))


def torch_products(call):
    """Names of the products that torch makes inside a call, and its result."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = call()
    return {e.key for e in seen.key_averages()} & {"aten::mm", "aten::addmm", "aten::linear"}, result


def test_torch_makes_the_product_only_where_it_is_faster():
    used, y = torch_products(lambda: ops.lora_linear(**arguments()))
    assert bool(used) == (NATIVE and torch.ops.ztok.isa_native(-1) == AVX512)
    check(arguments(), y)
    for changed in ({"M": 15}, {"in": 40}, {"dtype": torch.float32}, {"dtype": torch.float16}):
        given = arguments(**changed)
        used, y = torch_products(lambda given=given: ops.lora_linear(**given))
        assert not used, changed
        check(given, y)


def test_older_instruction_set_makes_its_own_product():
    before = torch.ops.ztok.isa_native(-1)
    if before < AVX2:
        pytest.skip("the processor has no AVX2")
    try:
        assert torch.ops.ztok.isa_native(AVX2) == AVX2
        used, y = torch_products(lambda: ops.lora_linear(**arguments()))
    finally:
        torch.ops.ztok.isa_native(before)
    assert not used
    check(arguments(), y)


def strided(given):
    """The same values in other layouts: rows apart, a weight that is stored transposed."""
    return given | {
        "x": torch.cat([given["x"], given["x"]], dim=1)[:, : given["x"].shape[1]],
        "weight": given["weight"].T.contiguous().T,
    }


@pytest.mark.parametrize("layout", [dict, strided])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients_against_float64(layout, wide, autocast):
    given = layout(arguments(wide=wide))
    names = LORA_LINEAR.spec.differentiable
    for name in names:
        given[name] = given[name].detach().requires_grad_()
    exact = {k: v.detach().double().requires_grad_() for k, v in given.items() if k in names}
    chosen = adapter_of_rows(given["x"], given["adapters"], None)
    expected = exact["x"] @ exact["weight"].T + exact["bias"]
    for i, scale in enumerate(given["scaling"].tolist()):
        own = (chosen == i)[:, None].double()
        expected = expected + own * scale * (exact["x"] @ exact["A"][i].T) @ exact["B"][i].T
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.lora_linear(**given)
        y.backward(grad)
    expected.backward(grad.double())
    check({k: v.detach() if torch.is_tensor(v) else v for k, v in given.items()}, y)
    for name in names:
        assert given[name].grad.dtype == given[name].dtype
        largest = exact[name].grad.abs().max()  # sums of many products cancel: errors are relative to the largest
        close(given[name].grad / largest, exact[name].grad / largest, given[name].dtype, 4, name)


def test_gradients_of_x_alone_and_of_adapters_alone():
    for wanted in (("x",), ("A", "B")):
        given = arguments()
        for name in wanted:
            given[name].requires_grad_()
        everything = arguments()
        for name in LORA_LINEAR.spec.differentiable:
            everything[name].requires_grad_()
        for each in (given, everything):
            ops.lora_linear(**each).float().square().sum().backward()
        for name in wanted:
            torch.testing.assert_close(given[name].grad, everything[name].grad, rtol=0, atol=0)


def test_rows_do_not_meet_other_adapters():
    given = arguments()
    given["A"][1], given["B"][1] = torch.nan, torch.inf
    y = ops.lora_linear(**given)
    others = given["adapters"] != 1
    assert y[others].isfinite().all() and not y[~others].isfinite().any()
    x = given["x"].detach().requires_grad_()
    ops.lora_linear(**(given | {"x": x})).sum().backward()
    assert x.grad[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float32_products_of_kernels_alone(dtype):
    """The quantiser's kernel multiplies in float32 by torch, which autocast must not change."""
    draw = torch.Generator().manual_seed(0)

    def run(enabled):
        inputs = [torch.randn(shape, generator=draw.manual_seed(0)) for shape in ((24, 32), (8, 32), (8, 32))]
        hidden, end, mean = (t.requires_grad_() for t in inputs)
        mass, offsets = torch.full((24,), 0.25), torch.tensor([0, 24], dtype=torch.int32)
        with torch.autocast("cpu", dtype, enabled=enabled):
            found = ops.quantize_ragged(
                hidden, mass, offsets, end, mean, torch.randn(2, 16, 8, generator=draw.manual_seed(3))
            )
            (found.latents.square().sum() + found.commitment).backward()
        return found.latents.detach(), hidden.grad, end.grad, mean.grad

    for plain, under_autocast in zip(run(False), run(True)):
        torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)
