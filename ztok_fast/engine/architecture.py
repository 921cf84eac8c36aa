"""What the engine needs of a Hugging Face model: plain settings and tensors, or the reason why it cannot run it."""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

MODELS = {
    "LlamaForCausalLM": "transformers.models.llama.modeling_llama",
    "MistralForCausalLM": "transformers.models.mistral.modeling_mistral",
    "Qwen2ForCausalLM": "transformers.models.qwen2.modeling_qwen2",
    "Qwen3ForCausalLM": "transformers.models.qwen3.modeling_qwen3",
}
"""Classes of models that the engine runs, and the modules that define them. SmolLM and SmolLM2 are Llama."""

BASE = "base"
"""The name of the model without an adapter."""

WIDTH_STEP = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


class EngineUnsupported(ValueError):
    """The engine cannot run a model, or cannot run on this processor. The message says what, expected and got."""


@dataclass(frozen=True)
class Settings:
    """The sizes and constants of a model."""

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    eps: float
    head_norm: bool
    """Whether queries and keys are normalised per head (Qwen3)."""
    frequencies: tuple[float, ...]
    """Frequencies of the rotary positions, each a correctly rounded float; half the head's width of them."""
    window: int | None
    """Most rows that a sequence may have, where the model's attention is limited to a sliding window."""
    end_tokens: tuple[int, ...]
    """The model's own end-of-text tokens."""


@dataclass(frozen=True)
class Fold:
    """A LoRA adapter of one linear layer: `weight + scale * (B @ A)`."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Projection:
    """One linear layer: weight [N, K], bias [N] or None, and the adapters that it has, by name."""

    weight: Tensor
    bias: Tensor | None
    folds: dict[str, Fold]


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer; `query_norm` and `key_norm` are None where the model has none."""

    input_norm: Tensor
    inner_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Projection
    key: Projection
    value: Projection
    out: Projection
    gate: Projection
    up: Projection
    down: Projection

    def projections(self) -> tuple[Projection, ...]:
        return self.query, self.key, self.value, self.out, self.gate, self.up, self.down


@dataclass(frozen=True)
class Architecture:
    """A model as data: what `read` finds in it. The tensors are on the CPU: the model's own, where it is there."""

    settings: Settings
    embeddings: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    adapters: tuple[str, ...]
    """The names asked for; `BASE` stands for the bare model."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that the result depends on, with names, in a fixed order."""
        yield "embeddings", self.embeddings
        yield "norm", self.norm
        yield "head", self.head
        for index, layer in enumerate(self.layers):
            for name, value in vars(layer).items():
                if isinstance(value, Projection):
                    yield f"{index}.{name}.weight", value.weight
                    if value.bias is not None:
                        yield f"{index}.{name}.bias", value.bias
                    for adapter, fold in value.folds.items():
                        yield f"{index}.{name}.{adapter}.A", fold.A
                        yield f"{index}.{name}.{adapter}.B", fold.B
                elif value is not None:
                    yield f"{index}.{name}", value


def unsupported(what: str, expected: object, got: object) -> NoReturn:
    raise EngineUnsupported(f"engine: {what}: expected {expected}, got {got}")


def read(model: nn.Module, adapters: str | Sequence[str | None] | None = None) -> Architecture:
    """Settings and tensors of a Hugging Face model, or of a PEFT model around one.

    Args:
        model: a `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`, or a
            `peft.PeftModel` with LoRA adapters on one.
        adapters: names of adapters to make variants of the weights of; None or "base" among them is the bare model.
            None alone, the default: the bare model only.

    Raises:
        EngineUnsupported: the model computes something that the engine does not; the message says what.
        ValueError: an adapter that the model does not have, or one named twice.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    bare: Any = model if unwrap is None else unwrap()
    kind = type(bare).__name__
    if MODELS.get(kind) != type(bare).__module__:
        unsupported("model class", f"one of {', '.join(MODELS)}", f"{type(bare).__module__}.{kind}")
    names = _adapter_names(bare, adapters)
    settings = _settings(bare)
    kept = tuple(name for name in names if name != BASE)
    decoder = bare.model
    layers = tuple(_layer(f"layer {i}", module, settings, kept) for i, module in enumerate(decoder.layers))
    if len(layers) != settings.layers:
        unsupported("layers of the model", f"{settings.layers}, as its config says", len(layers))
    embeddings = _plain(decoder.embed_tokens, "embedding", nn.Embedding).weight
    head = _plain(bare.lm_head, "head", nn.Linear)
    if head.bias is not None:
        unsupported("head", "one without a bias", "one with a bias")
    size = (settings.vocabulary, settings.hidden)
    return Architecture(
        settings,
        _tensor(embeddings, "embedding", size),
        layers,
        _norm(decoder.norm, "final norm", settings.hidden, settings.eps),
        _tensor(head.weight, "head", size),
        names,
    )


def _adapter_names(model: nn.Module, adapters: str | Sequence[str | None] | None) -> tuple[str, ...]:
    if adapters is None or isinstance(adapters, str):
        adapters = (adapters,)
    names = tuple(BASE if name is None else name for name in adapters)
    there: set[str] = set()
    for module in model.modules():
        for held in ("lora_A", "lora_embedding_A"):
            there.update(getattr(module, held, ()))
    known = f"of {sorted(there | {BASE})}"
    if not names:
        raise ValueError(f"engine: adapters: expected one or more {known}, got none")
    for name in names:
        if not isinstance(name, str) or name != BASE and name not in there:
            raise ValueError(f"engine: adapters: expected names {known}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"engine: adapters: expected each name once, got {list(names)}")
    return names


def _settings(model: Any) -> Settings:
    config = model.config
    if config.hidden_act not in ("silu", "swish"):
        unsupported("activation", "silu", config.hidden_act)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for what, size in (
        ("head width", head_width),
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
    ):
        if size % WIDTH_STEP:
            unsupported(what, f"a multiple of {WIDTH_STEP}", size)
    if heads % kv_heads:
        unsupported("attention heads", f"a multiple of the {kv_heads} key-value heads", heads)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange:
            unsupported("attention of a layer", "full_attention or sliding_attention", strange[0])
        if "sliding_attention" not in kinds:
            window = None
    end = config.eos_token_id
    return Settings(
        kind=type(model).__name__,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        eps=float(config.rms_norm_eps),
        head_norm=type(model).__name__.startswith("Qwen3"),
        frequencies=frequencies(head_width, config.rope_parameters),
        window=window,
        end_tokens=() if end is None else tuple(end) if isinstance(end, (list, tuple)) else (end,),
    )


def _layer(name: str, module: Any, settings: Settings, adapters: tuple[str, ...]) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    hidden, inner, width = settings.hidden, settings.intermediate, settings.head_width
    queries, keys = settings.heads * width, settings.kv_heads * width

    def projection(part: str, linear: nn.Module, rows: int, columns: int) -> Projection:
        return _projection(f"{name}, {part}", linear, (rows, columns), adapters)

    def norm(part: str, norm: nn.Module, size: int) -> Tensor:
        return _norm(norm, f"{name}, {part}", size, settings.eps)

    return Layer(
        norm("input_layernorm", module.input_layernorm, hidden),
        norm("post_attention_layernorm", module.post_attention_layernorm, hidden),
        norm("q_norm", attention.q_norm, width) if settings.head_norm else None,
        norm("k_norm", attention.k_norm, width) if settings.head_norm else None,
        projection("q_proj", attention.q_proj, queries, hidden),
        projection("k_proj", attention.k_proj, keys, hidden),
        projection("v_proj", attention.v_proj, keys, hidden),
        projection("o_proj", attention.o_proj, hidden, queries),
        projection("gate_proj", mlp.gate_proj, inner, hidden),
        projection("up_proj", mlp.up_proj, inner, hidden),
        projection("down_proj", mlp.down_proj, hidden, inner),
    )


def _projection(name: str, module: Any, size: tuple[int, int], adapters: tuple[str, ...]) -> Projection:
    linear, folds = module, {}
    if hasattr(module, "base_layer"):
        if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora"):
            unsupported(f"adapter of {name}", "LoRA", f"{type(module).__module__}.{type(module).__name__}")
        if module.merged_adapters:
            unsupported(f"weight of {name}", "no merged adapter", f"{module.merged_adapters} merged into it")
        linear = module.base_layer
        folds = {a: _fold(f"adapter {a!r} of {name}", module, a, size) for a in adapters if a in module.lora_A}
    linear = _plain(linear, name, nn.Linear)
    bias = None if linear.bias is None else _tensor(linear.bias, f"bias of {name}", size[:1])
    return Projection(_tensor(linear.weight, f"weight of {name}", size), bias, folds)


def _fold(name: str, layer: Any, adapter: str, size: tuple[int, int]) -> Fold:
    if adapter in layer.lora_variant:
        unsupported(name, "plain LoRA", type(layer.lora_variant[adapter]).__name__)
    A, B = (_plain(part[adapter], name, nn.Linear) for part in (layer.lora_A, layer.lora_B))
    if B.bias is not None:
        unsupported(name, "one without a bias", "one with a bias")
    scale = layer.scaling[adapter]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        unsupported(f"scaling of {name}", "a finite number", repr(scale))
    rank = A.weight.shape[0]
    return Fold(
        _tensor(A.weight, f"A of {name}", (rank, size[1])), _tensor(B.weight, f"B of {name}", (size[0], rank)), scale
    )


def _norm(module: Any, name: str, size: int, eps: float) -> Tensor:
    if not type(module).__name__.endswith("RMSNorm"):
        unsupported(name, "RMSNorm", type(module).__name__)
    if module.variance_epsilon != eps:
        unsupported(f"epsilon of {name}", eps, module.variance_epsilon)
    return _tensor(module.weight, name, (size,))


def _plain(module: Any, name: str, kind: type) -> Any:
    if type(module) is not kind:
        unsupported(name, f"torch.nn.{kind.__name__}", f"{type(module).__module__}.{type(module).__name__}")
    return module


def _tensor(value: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        unsupported(f"{name}, shape", list(shape), list(value.shape))
    if value.device.type not in ("cpu", "cuda"):
        unsupported(f"{name}, device", "the CPU or a CUDA device (model.to('cpu'))", value.device)
    if value.dtype not in _DTYPES:
        unsupported(f"{name}, dtype", ", ".join(str(d).removeprefix("torch.") for d in _DTYPES), value.dtype)
    return value.detach().cpu()


def frequencies(width: int, rope: dict[str, Any]) -> tuple[float, ...]:
    """Frequencies of the rotary positions of a head of `width` values, correctly rounded to floats.

    They are computed in decimal arithmetic, which gives the same digits on every machine; libm does not.

    Args:
        rope: `rope_parameters` of a config of transformers; of its types "default", "linear" and "llama3".
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        unsupported("rope type", "default, linear or llama3", kind)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        unsupported("partial_rotary_factor", 1, rope["partial_rotary_factor"])
    with decimal.localcontext() as context:
        context.prec = 60
        log_base = Decimal(rope["rope_theta"]).ln()
        plain = [(log_base * (-2 * i) / width).exp() for i in range(width // 2)]
        return tuple(nearest_float(_scaled(value, kind, rope)) for value in plain)


def _scaled(frequency: Decimal, kind: str, rope: dict[str, Any]) -> Decimal:
    """A frequency of longer context: Llama 3.1 keeps the high ones, divides the low ones and goes over in between."""
    if kind == "default":
        return frequency
    divided = frequency / Decimal(rope["factor"])
    if kind == "linear":
        return divided
    low, high = Decimal(rope["low_freq_factor"]), Decimal(rope["high_freq_factor"])
    turns = Decimal(rope["original_max_position_embeddings"]) * frequency / (2 * _PI)
    share = min(max((turns - low) / (high - low), Decimal(0)), Decimal(1))
    return (1 - share) * divided + share * frequency


def nearest_float(value: Decimal) -> float:
    """The binary32 number nearest to a decimal one, ties to even, rounded once."""
    # Rounding to binary64 first may end one step off.
    near = np.float32(float(value))
    candidates = [np.nextafter(near, np.float32(-math.inf)), near, np.nextafter(near, np.float32(math.inf))]
    with decimal.localcontext() as context:
        context.prec = 1200  # the difference of any two of these numbers is exact
        return float(min(candidates, key=lambda c: (abs(Decimal(float(c)) - value), int(c.view(np.uint32)) & 1)))
