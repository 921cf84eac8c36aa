"""Baselines of `lora_linear`."""

from __future__ import annotations

import torch

from bench.subject import Baseline, OpSubject, forward_only, same
from ztok_fast.ops.lora.lora_linear import adapter_of_rows
from ztok_fast.ops.spec import BACKWARD, FORWARD


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
            weight = torch.nn.Parameter(inputs[stack].detach()[i].clone())
            getattr(layer, name)[f"adapter{i}"].weight = weight
    return layer


def _peft(case, inputs):
    layer = _peft_layer(case, inputs)
    if case["n"] > 1:
        chosen = adapter_of_rows(inputs["x"], inputs["adapters"], inputs["cu_seqlens"]).tolist()
        names = [f"adapter{i}" for i in chosen]
        layer.eval()
        return lambda: (layer(inputs["x"], adapter_names=names), ())
    layer.set_adapter("adapter0")
    if case.direction == FORWARD:
        layer.eval()
        return lambda: (layer(inputs["x"]), ())
    layer.train()
    leaves = [inputs["x"], layer.lora_A["adapter0"].weight, layer.lora_B["adapter0"].weight]

    def call():
        y = layer(inputs["x"])
        d_x, d_A, d_B = inputs.gradients(y, leaves=leaves)
        return y, (d_x, d_A[None], d_B[None])

    return call


def _peft_compiled(case, inputs):
    layer = _peft_layer(case, inputs)
    layer.set_adapter("adapter0")
    layer.eval()
    compiled = torch.compile(layer)
    return lambda: (compiled(inputs["x"]), ())


def _three_products(case, inputs):
    x, weight, A, B, scale = inputs["x"], inputs["weight"], inputs["A"][0], inputs["B"][0], float(inputs["scaling"][0])

    def call():
        y = torch.addmm(x @ weight.T, x @ A.T, B.T, alpha=scale)
        return y, inputs.gradients(y) if case.direction == BACKWARD else ()

    return call


def _base(case, inputs):
    x, weight = inputs["x"].detach(), inputs["weight"]
    return lambda: torch.nn.functional.linear(x, weight)


def _no_mixed_backward(case):
    return "several adapters at inference only" if case["n"] > 1 and case.direction == BACKWARD else None


def _compiles(case):
    if "compile" not in case.tags:
        return "compiled for chosen shapes only: each takes tens of seconds"
    return None if case["n"] == 1 and case.direction == FORWARD else "one adapter, forward only"


BASELINES = (
    Baseline("PEFT", _peft, same, "peft", refuses=_no_mixed_backward,
             note="its LoRA layer around nn.Linear; several adapters by adapter_names, a name per row"),
    Baseline("PEFT, compiled", _peft_compiled, same, "peft", refuses=_compiles,
             note="torch.compile of the same layer, compiled before it is timed"),
    Baseline("three products", _three_products, same,
             refuses=lambda case: None if case["n"] == 1 else "one adapter only",
             note="torch: addmm(x @ Wᵀ, x @ Aᵀ, Bᵀ)"),
    Baseline("base linear", _base, kind="mark", refuses=forward_only,
             note="torch.nn.functional.linear(x, W) without any adapter"),
)  # fmt: skip

SUBJECTS = (OpSubject("lora_linear", BASELINES),)
