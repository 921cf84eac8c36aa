"""Which text positions give a Z-token: halting mass, its budget, and the units that follow.

The mass of a token is the share of a Z-token it asks for. A budget r wants sum(mass) = N / r over a
section; the mass is scaled to that, so the achieved ratio follows from the arithmetic while *where* the
Z-tokens go is learned.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.ops import HaltingUnits, halting_units

MASS_BITS = 20
MASS_STEP = 2.0**-MASS_BITS
"""The grid that mass is rounded to; one step more than 1 / n lets n tokens end a unit despite rounding."""


def mass_floor(max_unit_length: int) -> float:
    """The least mass of a token: ``max_unit_length`` of them reach the threshold despite rounding."""
    return 1.0 / max_unit_length + MASS_STEP


ADAPTIVITY = 0.15
"""Share of the mass that follows surprisal; the rest is uniform. More of it makes long units of predictable text,
which crowd more tokens into one latent."""


SEGMENT_SPREAD = 0.04
"""How far apart, in relative mass, the segments of a section are set before scaling."""


class HaltingHead(nn.Module):
    """Predicts the relative density of every text token: the logarithm of its mass times r."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, 64)
        self.out = nn.Linear(64, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor, ratio: torch.Tensor, max_unit_length: int) -> torch.Tensor:
        """Raw mass ``[T]`` from hidden states ``[T, D]`` and the ratio asked of each row ``[T]``."""
        log_density = self.out(torch.nn.functional.silu(self.hidden(hidden)))[:, 0].float()
        return (log_density.clamp(-4, 4).exp() / ratio).clamp(mass_floor(max_unit_length), 1.0)


def fixed_mass(ratio: torch.Tensor) -> torch.Tensor:
    """Equal mass for every token: units of r tokens, the baseline of every report."""
    # A hair above 1/r, so that r equal summands reach the threshold despite rounding.
    return (1.0 / ratio + 2 * MASS_STEP).clamp(max=1.0)


def surprisal_mass(
    bits: torch.Tensor, ratio: torch.Tensor, cu_sections: torch.Tensor, config: ZTokConfig
) -> torch.Tensor:
    """The mass that the halting head learns: in part uniform, in part in proportion to the token's surprisal.

    Args:
        bits: surprisal of every token under the bare base model, ``[T]``, in bits.
        ratio: the ratio asked of every token, ``[T]``.
        cu_sections: ``[G + 1]`` offsets of the sections over which the mean is taken.
    """
    lengths = cu_sections.diff().long()
    section = torch.repeat_interleave(torch.arange(len(lengths), device=bits.device), lengths)
    total = torch.zeros(len(lengths), device=bits.device).index_add_(0, section, bits)
    mean = (total / lengths.clamp(min=1)).clamp(min=1e-3)
    density = 1 - ADAPTIVITY + ADAPTIVITY * bits / mean[section]
    return (density / ratio).clamp(mass_floor(config.max_unit_length), 1.0)


def unit_counts(mass: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    """Units of every segment, int64 ``[S]``, as `halting_units` counts them (mode "fire").

    Only the segments' sums are needed. On the op's fixed-point grid the sums are exact, and no row has more than the
    threshold, so as many rows end a unit as the threshold goes into the sum. The rows after them are one more unit.

    Args:
        mass: ``[T]`` in [0, 1]; cu_segments: ``[S + 1]``.
    """
    steps = (mass.double() / MASS_STEP).round_().long()
    before = torch.nn.functional.pad(steps.cumsum(0), (1, 0))
    begin, end = cu_segments[:-1].long(), cu_segments[1:].long()
    # An empty segment reads the row before it, or row 0, and is cleared below.
    last = (end - 1).clamp(min=0)
    without_last = (before[last] - before[begin]).clamp(min=0)
    whole = (before[end] - before[begin]) >> MASS_BITS
    has_rest = whole == without_last >> MASS_BITS
    return torch.where(end > begin, whole + has_rest, 0)


def scale_to_budget(
    mass: torch.Tensor,
    ratio: torch.Tensor,
    cu_segments: torch.Tensor,
    cu_sections: torch.Tensor,
    max_unit_length: int,
    iterations: int = 16,
) -> torch.Tensor:
    """Scale the mass of every section to the most units that are no more than tokens / ratio (one at least).

    The number of units grows with the scale, so a bisection finds it, for all sections at once and by
    `unit_counts` alone; the scale itself carries no gradient.

    Args:
        mass: ``[T]`` raw mass in [1/max_unit_length, 1].
        ratio: ``[G]`` ratio asked of each section.
        cu_segments: ``[S + 1]`` token offsets of the segments, at whose ends units are closed.
        cu_sections: ``[G + 1]`` offsets of the sections in *segments*.

    Returns:
        ``[T]`` mass, differentiable in ``mass``.
    """
    floor = mass_floor(max_unit_length)
    with torch.no_grad():
        lengths = cu_segments.diff().long()
        section_of_segment = torch.repeat_interleave(
            torch.arange(len(cu_sections) - 1, device=mass.device), cu_sections.diff().long()
        )
        section = torch.repeat_interleave(section_of_segment, lengths)
        sections = len(cu_sections) - 1
        tokens = torch.zeros(sections, device=mass.device).index_add_(0, section_of_segment, lengths.float())
        # Segments of equal mass would all gain a unit at the same scale and jump past the budget together; a spread
        # of a few percent, in golden-ratio steps, lets them gain it one after another.
        index = torch.arange(len(lengths), device=mass.device) - cu_sections.long()[section_of_segment]
        spread = 1 + SEGMENT_SPREAD * ((index * 0.6180339887) % 1 - 0.5)
        spread = spread[torch.repeat_interleave(torch.arange(len(lengths), device=mass.device), lengths)]
        wanted = (tokens / ratio).clamp(min=1.0)
        # From every mass at the floor to every mass at 1: the whole range of what scaling can do.
        reach = max(4.0, math.log2(max_unit_length))
        low = torch.full_like(wanted, -reach)
        high = torch.full_like(wanted, reach)
        spread_mass = mass * spread
        for _ in range(iterations):
            middle = (low + high) / 2
            counts = unit_counts((spread_mass * middle.exp2()[section]).clamp(floor, 1.0), cu_segments)
            units = torch.zeros(sections, device=mass.device).index_add_(0, section_of_segment, counts.float())
            over = units > wanted
            high = torch.where(over, middle, high)
            low = torch.where(over, low, middle)
        scale = spread * low.exp2()[section]
    return (mass * scale).clamp(floor, 1.0)


def steps_before_stop(mass: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many steps of each row come before the one at which it halts, int64 ``[B]``.

    The halting mode "stop" of `halting_units`: the step whose end mass reaches the threshold is
    end-of-Z itself; a row that never does runs to its last step.

    Args:
        mass: ``[B, steps]``, the mass of end-of-Z at every step.
    """
    rows, steps = mass.shape
    cu_steps = torch.arange(rows + 1, dtype=torch.int32, device=mass.device) * steps
    units = halting_units(mass.reshape(-1), cu_steps, threshold, "stop")
    return ((units.unit >= 0) & (mass.reshape(-1) < threshold)).reshape(rows, steps).sum(1)


def unit_lengths(units: HaltingUnits, total_units: int) -> torch.Tensor:
    """Text tokens of every unit, int32 ``[K]``."""
    lengths = torch.zeros(total_units, dtype=torch.int32, device=units.unit.device)
    return lengths.index_add_(0, units.unit.long(), torch.ones_like(units.unit))
