"""Codebook care: k-means initialisation from real latents, usage statistics, dead-code replacement."""

from __future__ import annotations

import torch

from ztok_fast.codec.layout import block_bounds
from ztok_fast.ops import codebook_assign


@torch.no_grad()
def kmeans(points: torch.Tensor, clusters: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm: ``[clusters, d]`` centres of ``points [N, d]``.

    Starts from randomly chosen points; a centre that loses all its points restarts at the point worst served.
    With fewer points than clusters, points stand for several centres.

    Raises:
        ValueError: no points.
    """
    if len(points) < 1:
        raise ValueError("k-means: expected at least one point, got none")
    order = torch.randperm(len(points), generator=generator, device=points.device)
    centres = points[order[torch.arange(clusters, device=points.device) % len(points)]].clone()
    for _ in range(iterations):
        assignment = codebook_assign(points, centres)
        codes = assignment.codes.long()
        counts = torch.bincount(codes, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, codes, points)
        empty = counts == 0
        centres = torch.where(empty[:, None], centres, sums / counts.clamp(min=1)[:, None])
        missing = int(empty.sum())
        if missing:
            worst = assignment.distances.argsort(descending=True)[:missing]
            centres[empty.nonzero()[: len(worst), 0]] = points[worst]
    return centres


@torch.no_grad()
def initialise_codebooks(codebooks: torch.Tensor, latents: torch.Tensor, iterations: int, seed: int) -> None:
    """Fill ``codebooks [L, V, d]`` in place with k-means of ``latents [N, d]``.

    Level l clusters block l of the latent's columns, so that each level starts with a share of the columns to
    itself: as a product quantiser, which keeps tokens bound to different blocks apart.
    """
    generator = torch.Generator(device=latents.device).manual_seed(seed)
    codebooks.zero_()
    for codebook, (begin, end) in zip(codebooks, block_bounds(latents.shape[1], len(codebooks))):
        if begin < end:
            codebook[:, begin:end] = kmeans(
                latents[:, begin:end].float().contiguous(), len(codebook), iterations, generator
            )


@torch.no_grad()
def keep_blocks(codebooks: torch.Tensor) -> None:
    """Clear, in place, what ``codebooks [L, V, d]`` hold outside their own block of columns.

    Left free, the first levels would take in the blocks of the others, and their search would follow the whole latent.
    """
    for codebook, (begin, end) in zip(codebooks, block_bounds(codebooks.shape[2], len(codebooks))):
        codebook[:, :begin] = 0
        codebook[:, end:] = 0


class CodebookCare:
    """Running usage of every code and a store of recent latents to draw replacements from.

    Args:
        levels, size: L and V; store: how many recent latents are kept; decay: of the running usage.
    """

    def __init__(self, levels: int, size: int, store: int, decay: float = 0.98) -> None:
        self.usage = torch.full((levels, size), 1.0 / size)
        self.latents = torch.empty(0)
        self.store, self.decay = store, decay

    def observe(self, latents: torch.Tensor, usage: torch.Tensor | None) -> None:
        """Take in a step's latents ``[K, d]`` and, once quantised, its hard counts ``[L, V]``."""
        latents = latents.detach().float().cpu()
        self.latents = torch.cat([self.latents.reshape(-1, latents.shape[1]), latents])[-self.store :]
        if usage is not None:
            usage = usage.float().cpu()
            share = usage / usage.sum(1, keepdim=True).clamp(min=1)
            self.usage = self.decay * self.usage + (1 - self.decay) * share

    @torch.no_grad()
    def replace_dead(self, codebooks: torch.Tensor, threshold: float, generator: torch.Generator) -> list[torch.Tensor]:
        """Move codes used less than ``threshold`` times the even share onto residuals of recent latents.

        Args:
            codebooks: ``[L, V, d]``, written in place. Autograd sees it: a backward pass through a graph built before
                raises, and never goes on with the new values.

        Returns:
            The replaced indices of each level.
        """
        size = codebooks.shape[1]
        if not len(self.latents):
            return [torch.zeros(0, dtype=torch.int64) for _ in codebooks]
        residual, replaced, moved = self.latents.to(codebooks.device), [], codebooks.detach().clone()
        for level, codebook in enumerate(moved):
            dead = (self.usage[level] < threshold / size).nonzero()[:, 0]
            dead = dead[: len(residual)]
            if len(dead):
                pick = torch.randperm(len(residual), generator=generator)[: len(dead)].to(residual.device)
                codebook[dead.to(codebook.device)] = residual[pick].to(codebook.dtype)
                self.usage[level, dead] = 1.0 / size
            replaced.append(dead)
            residual = residual - codebook.float()[codebook_assign(residual, codebook.float()).codes.long()]
        codebooks.copy_(moved)
        return replaced

    def perplexity(self) -> list[float]:
        """Perplexity of the running usage of each level; V would be even use of every code."""
        share = self.usage / self.usage.sum(1, keepdim=True)
        return (-(share * share.clamp(min=1e-12).log()).sum(1)).exp().tolist()

    def alive(self, threshold: float = 0.1) -> list[int]:
        """Codes of each level used at least ``threshold`` times the even share."""
        return (self.usage >= threshold / self.usage.shape[1]).sum(1).tolist()

    def state(self) -> dict:
        return {"usage": self.usage, "latents": self.latents}

    def load_state(self, state: dict) -> None:
        self.usage, self.latents = state["usage"], state["latents"]
