"""Differentiation of every kind through patched PEFT layers."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import ztok_fast
from tests.test_patch import calls
from ztok_fast import peft_lora

__all__ = ["calls"]  # a fixture


@pytest.fixture
def small():
    """A PEFT layer, patched nowhere, with the parameters of its adapter and an input."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(6, 5)))
    adapter = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return model, adapter, torch.randn(3, 6)


def double_backward(model, adapter, x):
    leaves = [x.clone().requires_grad_(), *(p for name, p in model.named_parameters() if "lora_" in name)]
    first = torch.autograd.grad(model(leaves[0]).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def dual_tensors(model, adapter, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def loss(model):
    return lambda adapter, x: torch.func.functional_call(model, adapter, (x,)).square().sum()


TRANSFORMS = {
    "double backward": double_backward,
    "dual tensors": dual_tensors,
    "grad": lambda model, adapter, x: torch.func.grad(loss(model), argnums=(0, 1))(adapter, x),
    "vmap(grad)": lambda model, adapter, x: torch.func.vmap(torch.func.grad(loss(model)), (None, 0))(adapter, x),
    "vmap": lambda model, adapter, x: torch.func.vmap(model)(torch.stack([x, 2 * x])),
    "jvp": lambda model, adapter, x: torch.func.jvp(
        loss(model), (adapter, x), ({k: torch.ones_like(v) for k, v in adapter.items()}, torch.ones_like(x))
    ),
    "jacrev": lambda model, adapter, x: torch.func.jacrev(model)(x),
    "jacfwd": lambda model, adapter, x: torch.func.jacfwd(model)(x),
    "hessian": lambda model, adapter, x: torch.func.hessian(loss(model))(adapter, x),
    "batched gradients": lambda model, adapter, x: (
        lambda leaf: torch.autograd.grad(model(leaf), leaf, torch.eye(15).view(15, 3, 5), is_grads_batched=True)
    )(x.clone().requires_grad_()),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_differentiation_of_every_kind_gives_what_peft_gives(transform, grad, small, calls):
    """They raised errors from torch's depths, and forward mode gave zeros."""
    if not grad and transform in ("double backward", "batched gradients"):
        pytest.skip("records a graph")
    model, adapter, x = small
    with torch.set_grad_enabled(grad):
        plain = model(x)
        expected = TRANSFORMS[transform](model, adapter, x)
        with ztok_fast.patch(model):
            found = TRANSFORMS[transform](model, adapter, x)
            assert calls
            for got, wanted in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(x), plain)  # nothing of the transform is left in the layer
            with FakeTensorMode(allow_non_fake_inputs=True):
                model(torch.empty(3, 6))
            torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_compiles_to_one_graph(grad, small, calls):
    model, _, x = small
    expected = model(x)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad), ztok_fast.patch(model):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(model(x), expected)


def test_another_thread_never_reads_a_stale_scaling(small):
    """Whatever is stored in a layer's cache, a thread that looks at it right then gets the scaling of now."""
    model, _, x = small
    layer = model[0]
    seen = []

    class Watched(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if layer.scaling["default"] not in seen:
                seen.append(layer.scaling["default"])
                seen.append(float(peft_lora._scaling(layer, ["default"], x, self)))

    cache = Watched()
    for scaling in (2.0, 0.25):
        layer.scaling["default"] = scaling
        assert float(peft_lora._scaling(layer, ["default"], x, cache)) == scaling
    assert seen == [2.0, 2.0, 0.25, 0.25]
