"""`lora_linear`: y = x Wᵀ + s (x Aᵀ) Bᵀ, one adapter or several in one batch."""

from __future__ import annotations

import torch

from bench.micro.case import BACKWARD, FORWARD, Case, Op, Peer, Work, close, randn, with_gradients
from bench.micro.shapes import LLAMA_7B, LLAMA_8B, QWEN3, SMOLLM2, offsets
from ztok_fast import ops

CHECKED_PRODUCTS = 1 << 30
"""Bound of (rows of y and dx checked) x in x out."""


def _cases():
    found: dict[str, Case] = {}

    def add(M, width, out, r, smallest, n=1, direction=FORWARD, dtype=torch.float32, devices=("cpu", "cuda"), tags=()):
        shape = {"M": M, "in": width, "out": out, "r": r, "n": n}
        # The weights of a decode step come from memory: a model has many layers.
        case = Case("lora_linear", shape, dtype, direction, smallest, devices, M < 64, tags)
        found.setdefault(case.key, case)

    half = torch.bfloat16
    small, middle, large = (SMOLLM2, QWEN3, LLAMA_7B)
    add(7, 12, 9, 2, "tiny")
    add(7, 12, 9, 2, "tiny", n=3, direction=BACKWARD)
    add(1, *small, 16, "quick", tags=("compile",))
    add(512, *small, 16, "quick", tags=("compile",))
    for M in (1, 512):
        add(M, small[0], small[0], 16, "default")
        add(M, *small[::-1], 32, "default")
        add(M, *middle, 16, "default")
        add(M, *small, 16, "default", n=3)
        add(M, large[0], large[0], 16, "default")
        add(M, *small, 128, "default")
        add(M, *large, 16, "full")
        add(M, *LLAMA_8B, 16, "full")
        add(M, *LLAMA_8B[::-1], 64, "full")
    add(8, *small, 16, "default", n=3)
    add(1, *small, 16, "default", dtype=half)
    add(1, *large, 16, "default", dtype=half)
    add(512, *small, 16, "default", dtype=half)
    for n in (1, 3):
        add(512, *small, 16, "default", n=n, direction=BACKWARD)
    add(512, *middle, 16, "default", direction=BACKWARD)
    for M in (1, 16, 64, 512, 8192):
        for sizes in (middle, large):
            add(M, *sizes, 16, "default", dtype=half, devices=("cuda",), tags=("compile",) if M == 8192 else ())
            add(M, *sizes, 16, "default", n=3, dtype=half, devices=("cuda",))
    for r in (16, 64, 128):
        add(8192, *large, r, "default", direction=BACKWARD, dtype=half, devices=("cuda",))
    add(8192, *large, 16, "default", n=3, direction=BACKWARD, dtype=half, devices=("cuda",))
    return tuple(found.values())


LEAVES = ("x", "A", "B")


def make(case, device, generator):
    M, width, out, r, n = (case[name] for name in ("M", "in", "out", "r", "n"))
    wide = case.dtype
    inputs = {
        "x": randn(generator, M, width, dtype=wide),
        "weight": randn(generator, out, width, scale=width**-0.5, dtype=wide),
        "A": randn(generator, n, r, width, scale=width**-0.5, dtype=wide),
        "B": randn(generator, n, out, r, scale=r**-0.5, dtype=wide),
        "scaling": torch.tensor([2.0, 1.0, 0.5][:n], device=device),
        "adapters": None,
        "cu_seqlens": None,
    }
    if n > 1:
        # Sequences of a row or more each, their adapters in turn: compressor, decompressor and inferencer side by side.
        sequences = min(M, 2 * n)
        lengths = [M // sequences + (i < M % sequences) for i in range(sequences)]
        inputs["lengths"] = lengths
        inputs["adapters"] = torch.tensor([i % n for i in range(sequences)], dtype=torch.int32, device=device)
        inputs["cu_seqlens"] = offsets(lengths, device)
    if case.direction == BACKWARD:
        inputs["grad"] = randn(generator, M, out, dtype=wide)
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
    device = inputs["x"].device
    if inputs["adapters"] is None:
        return torch.zeros(case["M"], dtype=torch.int64, device=device)
    return inputs["adapters"].long().repeat_interleave(torch.tensor(inputs["lengths"], device=device))


def check(case, inputs, found):
    y, grads = found
    adapter = _adapter_of_rows(case, inputs)
    x, weight, A, B, s = (inputs[name].detach() for name in ("x", "weight", "A", "B", "scaling"))
    count = min(case["M"], max(2, CHECKED_PRODUCTS // (case["in"] * case["out"])))
    rows = torch.linspace(0, case["M"] - 1, count, device=x.device).round().long().unique()
    wide_x = x.double()
    low = torch.zeros(case["M"], case["r"], dtype=torch.float64, device=x.device)
    expected = wide_x[rows] @ weight.double().T
    for i in range(case["n"]):
        own = adapter == i
        low[own] = float(s[i]) * (wide_x[own] @ A[i].double().T)
        chosen = adapter[rows] == i
        expected[chosen] += low[rows[chosen]] @ B[i].double().T
    if y.shape != (case["M"], case["out"]):
        raise AssertionError(f"y: expected {[case['M'], case['out']]}, got {list(y.shape)}")
    close(y.detach()[rows], expected, case.dtype, 4, "y")
    if not grads:
        return
    grad = inputs["grad"].double()
    d_x = grad[rows] @ weight.double()
    for i in range(case["n"]):
        own = adapter == i
        d_low = float(s[i]) * (grad[own] @ B[i].double())
        chosen = adapter[rows] == i
        d_x[chosen] += (float(s[i]) * (grad[rows[chosen]] @ B[i].double())) @ A[i].double()
        _close_to_size(grads[1][i], d_low.T @ wide_x[own], case, f"gradient of A[{i}]")
        _close_to_size(grads[2][i], grad[own].T @ low[own], case, f"gradient of B[{i}]")
    _close_to_size(grads[0][rows], d_x, case, "gradient of x")


def _close_to_size(got, wanted, case, what):
    """Sums of hundreds of terms of either sign: what cancels is measured against the size of the whole gradient."""
    size = float(wanted.square().mean().sqrt())
    close(got / size, wanted / size, case.dtype, 8, f"{what}, divided by its root mean square")


def work(case, inputs):
    M, width, out, r, size = case["M"], case["in"], case["out"], case["r"], case.dtype.itemsize
    used = min(case["n"], M)
    low = 2.0 * M * r * (width + out)
    parameters = width * out + used * r * (width + out)
    least = Work(2.0 * M * width * out + low, (M * (width + out) + parameters) * size)
    if case.direction == BACKWARD:
        moved = (M * (2 * width + out) + parameters + used * r * (width + out)) * size
        return Work(least.flops + 2.0 * M * width * out + 2 * low, least.bytes + moved)
    return least


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
    _cases(),
    make,
    lambda inputs: inputs["x"],
    run,
    check,
    work,
    check,
    PEERS,
    companions=("lora_linear_backward",),
    flops_of_reference=1.0,
)
