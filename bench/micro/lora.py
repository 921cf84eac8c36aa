"""`lora_linear`: y = x Wᵀ + s (x Aᵀ) Bᵀ, one adapter or several in one batch."""

from __future__ import annotations

from dataclasses import fields

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Op, Peer, close, randn, with_gradients
from ztok_fast import ops
from ztok_fast.ops.lora.lora_linear import CHECKED_PRODUCTS, SPEC, adapter_of_rows

LEAVES = ("x", "A", "B")


def make(case, device, generator):
    inputs = SPEC.make(case.shape, case.dtype, generator)
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, case["M"], case["out"], dtype=case.dtype)
        for name in LEAVES:
            inputs[name].requires_grad_()
    return inputs


def run(case, inputs):
    y = ops.lora_linear(
        inputs["x"],
        inputs["weight"],
        None,
        inputs["A"],
        inputs["B"],
        inputs["scaling"],
        inputs["adapters"],
        inputs["cu_seqlens"],
    )
    if case.direction == FORWARD:
        return y, ()
    return y, with_gradients([y], [inputs[name] for name in LEAVES], [inputs["grad"]])


def _adapter_of_rows(case, inputs):
    return adapter_of_rows(inputs["x"], inputs["adapters"], inputs["cu_seqlens"])


def check(case, inputs, found):
    y, grads = found
    SPEC.check(inputs, y)
    if not grads:
        return
    x, weight, A, B, s = (inputs[name].detach() for name in ("x", "weight", "A", "B", "scaling"))
    adapter = _adapter_of_rows(case, inputs)
    count = min(case["M"], max(2, CHECKED_PRODUCTS // (case["in"] * case["out"])))
    rows = torch.linspace(0, case["M"] - 1, count, device=x.device).round().long().unique()
    grad, wide_x = inputs["grad"].double(), x.double()
    d_x = grad[rows] @ weight.double()
    for i in range(case["n"]):
        own = adapter == i
        low_rank = float(s[i]) * (wide_x[own] @ A[i].double().T)
        d_low = float(s[i]) * (grad[own] @ B[i].double())
        chosen = adapter[rows] == i
        d_x[chosen] += (float(s[i]) * (grad[rows[chosen]] @ B[i].double())) @ A[i].double()
        _close_to_size(grads[1][i], d_low.T @ wide_x[own], case, f"gradient of A[{i}]")
        _close_to_size(grads[2][i], grad[own].T @ low_rank, case, f"gradient of B[{i}]")
    _close_to_size(grads[0][rows], d_x, case, "gradient of x")


def _close_to_size(got, wanted, case, what):
    """Sums of hundreds of terms of either sign: what cancels is measured against the size of the whole gradient."""
    size = float(wanted.square().mean().sqrt())
    close(got / size, wanted / size, case.dtype, 8, f"{what}, divided by its root mean square")


def _peft_layer(case, inputs):
    """PEFT's own layer around an `nn.Linear` that shares the case's weights."""
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Module()
    model.proj = torch.nn.Linear(case["in"], case["out"], bias=False, device="meta")
    model.proj.weight = torch.nn.Parameter(inputs["weight"], requires_grad=False)
    for i in range(case["n"]):
        # alpha = scaling x rank; PEFT divides it by the rank again
        config = LoraConfig(r=case["r"], lora_alpha=float(inputs["scaling"][i]) * case["r"], target_modules=["proj"])
        model = inject_adapter_in_model(config, model, adapter_name=f"adapter{i}")
    layer = model.proj
    for i in range(case["n"]):
        for name, stack in (("lora_A", "A"), ("lora_B", "B")):
            linear = getattr(layer, name)[f"adapter{i}"]
            linear.weight = torch.nn.Parameter(inputs[stack].detach()[i].clone())
    return layer


def _peft_run(case, inputs, layer):
    if case["n"] > 1:
        names = [f"adapter{i}" for i in _adapter_of_rows(case, inputs).tolist()]
        layer.eval()
        return lambda: (layer(inputs["x"], adapter_names=names), ())
    layer.set_adapter("adapter0")
    if case.direction == FORWARD:
        layer.eval()
        return lambda: (layer(inputs["x"]), ())
    layer.train()
    own = (
        getattr(layer, "lora_A", None) or layer._orig_mod.lora_A,
        getattr(layer, "lora_B", None) or layer._orig_mod.lora_B,
    )
    leaves = [inputs["x"], *(part["adapter0"].weight for part in own)]

    def call():
        y = layer(inputs["x"])
        d_x, d_A, d_B = with_gradients([y], leaves, [inputs["grad"]])
        return y, (d_x, d_A[None], d_B[None])

    return call


def _peft(case, inputs):
    return _peft_run(case, inputs, _peft_layer(case, inputs))


def _peft_compiled(case, inputs):
    layer = _peft_layer(case, inputs)
    layer.set_adapter("adapter0")
    layer.eval()
    compiled = torch.compile(layer)
    return lambda: (compiled(inputs["x"]), ())


def _three_products(case, inputs):
    x, weight, A, B, scale = inputs["x"], inputs["weight"], inputs["A"][0], inputs["B"][0], float(inputs["scaling"][0])
    leaves = [inputs[name] for name in LEAVES]

    def call():
        y = torch.addmm(x @ weight.T, x @ A.T, B.T, alpha=scale)
        return y, with_gradients([y], leaves, [inputs["grad"]]) if case.direction == BACKWARD else ()

    return call


def _base(case, inputs):
    x, weight = inputs["x"].detach(), inputs["weight"]
    return lambda: torch.nn.functional.linear(x, weight)


def _no_mixed_backward(case):
    if case["n"] > 1 and case.direction == BACKWARD:
        return "several adapters at inference only"
    return None


def _compiles(case):
    if "compile" not in case.tags:
        return "compiled for chosen shapes only: each takes tens of seconds"
    return None if case["n"] == 1 and case.direction == FORWARD else "one adapter, forward only"


PEERS = (
    Peer(
        "PEFT",
        _peft,
        lambda found: found,
        "peft",
        "peft",
        refuses=_no_mixed_backward,
        note="its LoRA layer around nn.Linear; several adapters by adapter_names, a name per row",
    ),
    Peer(
        "PEFT, compiled",
        _peft_compiled,
        lambda found: found,
        "peft",
        "peft",
        refuses=_compiles,
        note="torch.compile of the same layer, compiled before it is timed",
    ),
    Peer(
        "three products",
        _three_products,
        lambda found: found,
        refuses=lambda case: None if case["n"] == 1 else "one adapter only",
        note="torch: addmm(x @ Wᵀ, x @ Aᵀ, Bᵀ)",
    ),
    Peer(
        "base linear",
        _base,
        kind="mark",
        refuses=lambda case: None if case.direction == FORWARD else "forward only",
        note="torch.nn.functional.linear(x, W) without any adapter",
    ),
)

OP = Op(
    "lora_linear",
    tuple(Case("lora_linear", *(getattr(case, f.name) for f in fields(case))) for case in SPEC.cases),
    make,
    lambda inputs: inputs["x"],
    run,
    check,
    SPEC.work,
    check,
    PEERS,
    companions=("lora_linear_backward",),
    flops_of_reference=1.0,
)
