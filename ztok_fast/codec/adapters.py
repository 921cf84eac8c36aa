"""One frozen base model under three named LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ztok_fast.codec.attention import ATTENTION_NAME, register
from ztok_fast.codec.config import ConfigError, ZTokConfig
from ztok_fast.patching import patch

ADAPTERS = ("compressor", "decompressor", "inferencer")


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of layers under a causal language model's head (``LlamaModel``, ``GPT2Model``, …)."""
    return getattr(model, model.base_model_prefix)


def find_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The attribute name and the list of a decoder's transformer layers."""
    lists = [(name, child) for name, child in decoder.named_children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        raise ConfigError(
            f"base model {type(decoder).__name__}: expected one list of transformer layers, "
            f"got {[name for name, _ in lists]}"
        )
    return lists[0]


def position_limit(decoder: PreTrainedModel) -> int | None:
    """Rows of a learned position table beside the token embedding (GPT-2); ``None`` for rotary positions."""
    words = decoder.get_input_embeddings()
    tables = [child for child in decoder.children() if isinstance(child, nn.Embedding) and child is not words]
    return min((table.num_embeddings for table in tables), default=None)


def linear_modules(model: PreTrainedModel, depth: int) -> list[str]:
    """Full names of the linear layers in the first ``depth`` transformer layers."""
    decoder = find_decoder(model)
    name, layers = find_layers(decoder)
    prefix = f"{model.base_model_prefix}.{name}"
    return [
        f"{prefix}.{index}.{child}"
        for index in range(depth)
        for child, module in layers[index].named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]


class AdaptedBase(nn.Module):
    """The frozen base, its three adapters and the switch between them.

    The base's own weights never require grad; the adapters' do, whichever is active, so that one
    backward pass reaches the adapters of several forward passes.

    Raises:
        ConfigError: the base carries adapters already, or is too small for the codec's segments or layers.
    """

    def __init__(self, base: PreTrainedModel, config: ZTokConfig) -> None:
        super().__init__()
        if any(isinstance(module, LoraLayer) for module in base.modules()):
            raise ConfigError("base model: expected a bare one, got one with adapters; load it again for another codec")
        self.position_limit = position_limit(find_decoder(base))
        needed = (config.context_segments + 1) * config.segment_length
        if self.position_limit is not None and needed > self.position_limit:
            raise ConfigError(
                f"codec settings: expected segments (with their context) of at most {self.position_limit} tokens, the "
                f"base model's positions, got {needed}"
            )
        register()
        base.set_attn_implementation(ATTENTION_NAME)
        decoder = find_decoder(base)
        stack_name, stack = find_layers(decoder)
        layer_count = len(stack)
        depth = config.compressor_layers or layer_count
        if depth > layer_count:
            raise ConfigError(f"codec setting compressor_layers: expected at most {layer_count}, got {depth}")
        self.compressor_layers = depth
        # The names are taken before the first adapter wraps the layers.
        targets = {n: linear_modules(base, depth if n == "compressor" else layer_count) for n in ADAPTERS}
        transposed = isinstance(base.get_submodule(targets["compressor"][0]), Conv1D)
        model: PeftModel | None = None
        for name in ADAPTERS:
            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=targets[name],
                # GPT-2's linear layers hold their weights transposed.
                fan_in_fan_out=transposed,
                task_type="CAUSAL_LM",
            )
            if model is None:
                model = get_peft_model(base, lora, adapter_name=name)
            else:
                model.add_adapter(name, lora)
        assert model is not None
        self.peft = model
        # Found once, because a step of decoding is short. A tuple registers no module twice. Adapters are set on
        # modules within the layers, so the decoder and its stack stay these objects.
        self._stack = (decoder, stack_name, stack)
        self._truncated_stack = (stack[:depth],)
        self._tuned = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self.patch = patch(model)
        """Runs the adapted layers through ``ops.lora_linear``; ``patch.undo()`` gives them PEFT's forward pass back."""
        self._active: str | None = None
        self.activate("compressor")

    @property
    def model(self) -> PreTrainedModel:
        """The causal language model with the adapters injected."""
        return self.peft.get_base_model()

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def end_tokens(self) -> list[int]:
        """The base's end-of-text tokens; none, one or several."""
        end = self.model.config.eos_token_id
        return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]

    @property
    def hidden_size(self) -> int:
        return self.embedding.weight.shape[1]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.peft.named_parameters() if "lora_" in n)

    def activate(self, name: str) -> None:
        """Make ``name`` the adapter of every layer that has it; layers without it run as the base."""
        # A step of decoding comes here too, and PEFT's switch takes longer than the products of a small base. PEFT
        # switches all layers or none, so one of them tells whether somebody else has switched since.
        if self._active == name and self._tuned[0].active_adapter == [name]:
            return
        for layer in self._tuned:
            layer.set_adapter(name)
        # PEFT freezes the adapters it switches away from; training needs the gradients of all three.
        for _, parameter in self.adapter_parameters():
            parameter.requires_grad_(True)
        self._active = name

    def forward(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_length: int | None = None,
        mask: torch.Tensor | None = None,
        cache=None,
        adapter: str | None = None,
        layers: int | None = None,
    ) -> torch.Tensor:
        """Last hidden states under one adapter.

        Args:
            embeds: packed ``[T, D]`` with ``cu_seqlens`` and ``max_length``, or ``[B, T, D]`` with ``mask``.
            position_ids: int64, the leading shape of ``embeds``.
            adapter: one of `ADAPTERS`, or ``None`` for the bare base model.
            layers: run only the first ``layers`` of the stack.

        Returns:
            The shape of ``embeds``.
        """
        packed = embeds.dim() == 2
        kwargs = {"use_cache": cache is not None, "past_key_values": cache, "attention_mask": mask}
        if packed:
            embeds, position_ids = embeds[None], position_ids[None]
            kwargs.update(cu_seq_lens_q=cu_seqlens, max_length_q=max_length)
        if adapter is not None:
            self.activate(adapter)
        with self._without_adapters(adapter is None), self._truncated(layers):
            hidden = self._stack[0](inputs_embeds=embeds, position_ids=position_ids, **kwargs).last_hidden_state
        return hidden[0] if packed else hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary logits ``[..., vocab]`` of hidden states ``[..., D]``."""
        return self.model.get_output_embeddings()(hidden)

    @contextmanager
    def _without_adapters(self, disable: bool):
        if not disable:
            yield
            return
        self._active = None  # PEFT freezes what it disables, and more when it enables it again
        with self.peft.disable_adapter():
            yield

    @contextmanager
    def _truncated(self, layers: int | None):
        decoder, name, stack = self._stack
        if layers is None or layers >= len(stack):
            yield
            return
        shorter = self._truncated_stack[0]
        setattr(decoder, name, shorter if len(shorter) == layers else stack[:layers])
        try:
            yield
        finally:
            setattr(decoder, name, stack)
