"""Run layers of other libraries through the ops of this package: `with ztok_fast.patch(model):`.

What is replaced is data: the name of a layer class and a `Replacement` for its forward pass. The engine sets the
replacement on the instances of one model and takes it back; it changes no class, no weight and no other model. Classes
are found by name, so nothing is imported that the model did not bring along.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import nn


@dataclass(frozen=True)
class Replacement:
    """How the forward pass of a layer class is replaced.

    Attributes:
        implementation: the module with two functions: ``why_not(layer)`` gives None or the reason why the layer, in
            the state it is in now, keeps its own forward pass; ``forward(layer, patched, *args, **kwargs)`` runs it,
            or says ``patched.refuse(reason)`` and calls ``patched.original``; it may keep things in ``patched.cache``.
        family: base class of the layers that a user would expect to be replaced; those without a replacement are
            reported.
    """

    implementation: str
    family: str


REPLACEMENTS: dict[str, Replacement] = {
    "peft.tuners.lora.layer.Linear": Replacement("ztok_fast.peft_lora", "peft.tuners.lora.layer.LoraLayer"),
}


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Patch:
    """The replaced forward passes of one model; a context manager.

    Attributes:
        model: the model.
        patched: names of the layers whose forward pass was replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.patched: list[str] = []
        # name -> the layer, its why_not and its new forward
        self._layers: dict[str, tuple[nn.Module, Callable, Callable]] = {}
        self._without: dict[str, str] = {}
        self._warned: set[str] = set()
        families = {replacement.family for replacement in REPLACEMENTS.values()}
        chosen = []
        for name, layer in model.named_modules():
            replacement = REPLACEMENTS.get(_class_name(type(layer)))
            if isinstance(vars(layer).get("forward"), _Forward):
                raise ValueError(f"patch: model must not be patched already, but {name!r} is; undo that first")
            if replacement is None:
                if any(_class_name(kind) in families for kind in type(layer).__mro__):
                    self._without[name] = f"there is no replacement for {type(layer).__name__}"
            elif "forward" in vars(layer):
                self._without[name] = "something else replaced its forward pass"
            else:
                chosen.append((name, layer, import_module(replacement.implementation)))
        if not chosen and not self._without:
            raise ValueError(
                f"patch: model must have a layer of class {' or '.join(REPLACEMENTS)}, got a {type(model).__name__} "
                "without one"
            )
        for name, layer, implementation in chosen:
            forward = _Forward(implementation.forward, layer, self._refuse)
            layer.forward = forward
            self._layers[name] = (layer, implementation.why_not, forward)
            self.patched.append(name)
        self._warn(self.kept)

    @property
    def kept(self) -> dict[str, str]:
        """Layers that run their own forward pass in the state that the model is in now, each with the reason."""
        reasons = {name: why_not(layer) for name, (layer, why_not, _) in self._layers.items()}
        return {**self._without, **{name: reason for name, reason in reasons.items() if reason is not None}}

    def undo(self) -> None:
        """Give all layers their own forward pass back; afterwards, and when called again, nothing is left to do.

        Raises:
            RuntimeError: something replaced the forward pass of a layer once more and has not taken that back.
        """
        for name, (layer, _, forward) in self._layers.items():
            if vars(layer).get("forward") is not forward:
                raise RuntimeError(f"undo: something replaced the forward pass of {name!r} since; undo that first")
        for layer, _, _ in self._layers.values():
            del layer.forward
        self._layers.clear()
        self.patched.clear()

    def _refuse(self, reason: str) -> None:
        """A layer uses its own forward pass; said once per reason."""
        if reason not in self._warned:
            self._warn({"": reason})

    def _warn(self, kept: dict[str, str]) -> None:
        self._warned.update(kept.values())
        for reason, count in Counter(kept.values()).items():
            layers = f"{count} layers keep" if count > 1 else "a layer keeps"
            warnings.warn(f"ztok_fast.patch: {layers} the forward pass of its library: {reason}", stacklevel=4)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({type(self.model).__name__}: {len(self.patched)} layers patched, {len(self.kept)} of all kept)"


class _Forward:
    """The forward attribute of a patched layer."""

    __slots__ = ("cache", "forward", "layer", "original", "refuse")

    def __init__(self, forward: Callable, layer: nn.Module, refuse: Callable[[str], None]) -> None:
        self.forward, self.layer, self.refuse = forward, layer, refuse
        self.original = type(layer).forward
        self.cache: dict = {}

    def __call__(self, *args, **kwargs):
        return self.forward(self.layer, self, *args, **kwargs)

    def __deepcopy__(self, memo):
        raise RuntimeError("a patched model cannot be copied: undo the patch first")

    def __reduce__(self):
        raise RuntimeError("a patched model cannot be pickled: undo the patch first")


def patch(model: nn.Module) -> Patch:
    """Run the PEFT LoRA layers of any model through `ops.lora_linear`, until undone.

    ``with ztok_fast.patch(model):`` undoes it at the end of the block; ``p = ztok_fast.patch(model)`` lasts until
    ``p.undo()``. Afterwards the model gives bit for bit what it gave before. While it lasts, logits and gradients agree
    with PEFT's within the rounding of the dtype; adapters may be added, switched, disabled, merged, scaled and mixed in
    a batch by ``adapter_names``, as ever.

    A layer whose semantics `lora_linear` does not have keeps PEFT's forward pass: dropout in training mode, variants
    such as DoRA, several adapters active at once, a bias in the adapter, a base layer that is neither `nn.Linear` nor
    `Conv1D`, hooks within the layer. `Patch.kept` names each with its reason, and each reason is warned of once.

    Args:
        model: a model with layers of class `peft.tuners.lora.Linear`, on any device.

    Returns:
        A `Patch`.

    Raises:
        ValueError: not a module, no such layer in it, or a layer of it is patched already.
    """
    return Patch(model)
