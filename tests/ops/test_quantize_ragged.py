from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.ops.conftest import dtypes_of
from tests.ops.test_quantize import HYPOTHESIS, on
from tests.ops.tolerances import assert_close
from ztok_fast import ops
from ztok_fast.ops.op import Op


def ragged_inputs(device, dtype=torch.float32, lengths=(5, 0, 1, 7), width=6, code_width=3):
    rows = sum(lengths)
    # sixteenths with an offset at the start of each sequence keep prefix sums off the multiples of the threshold
    mass = torch.randint(1, 16, (rows,)) / 16
    start = 0
    for length in lengths:
        mass[start : start + 1] -= 1 / 64 if length else 0
        start += length
    return on(
        device,
        {
            "hidden": torch.randn(rows, width).to(dtype),
            "mass": mass.to(torch.promote_types(dtype, torch.float32)),
            "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
            "end_weight": torch.randn(code_width, width).to(dtype),
            "mean_weight": torch.randn(code_width, width).to(dtype),
            "codebooks": torch.randn(2, 7, code_width).to(dtype),
        },
    )


FLOATS = ("hidden", "mass", "end_weight", "mean_weight", "codebooks")


@contextmanager
def counted_calls():
    """How often each op is run inside the block."""
    counts, run = {}, Op.run

    def counted(op, *args):
        counts[op.name] = counts.get(op.name, 0) + 1
        return run(op, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "run", counted)
        yield counts


def composed(hidden, mass, cu_seqlens, end_weight, mean_weight, codebooks, levels, total_units, mode="fire"):
    """What `quantize_ragged` does, from the ops it fuses."""
    units = ops.halting_units(mass, cu_seqlens, 1.0, mode)
    count = int(units.cu_units[-1])
    means = ops.integrate_units(hidden, units, count)
    latents = hidden[units.ends] @ end_weight.T + means @ mean_weight.T
    latents = latents / (latents.square().mean(1, keepdim=True) + 1e-6).sqrt()
    per_unit = levels.repeat_interleave(units.counts.long()) if levels is not None else None
    result = ops.residual_quantize(latents, codebooks, per_unit)
    spare = (0, 0, 0, total_units - count)
    codes = torch.nn.functional.pad(result.codes, spare, value=-1)
    quantized, latents = (torch.nn.functional.pad(t, spare) for t in (result.quantized, latents))
    return codes, quantized, latents, result.commitment, result.codebook_loss, result.usage, units


@pytest.mark.op("quantize_ragged")
class TestQuantizeRagged:
    @given(
        lengths=st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 9)), max_size=5),
        mode=st.sampled_from(["fire", "stop"]),
        with_levels=st.booleans(),
        spare=st.integers(0, 3),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        seed=st.integers(0, 2**31),
    )
    @HYPOTHESIS
    def test_is_the_ops_it_fuses(self, backend, device, lengths, mode, with_levels, spare, dtype, seed):
        assume(dtype in dtypes_of("quantize_ragged", backend))
        torch.manual_seed(seed)
        arguments = ragged_inputs(device, dtype, lengths)
        # expected of the same numbers in float64
        wide = {name: arguments[name].double().requires_grad_() for name in FLOATS}
        for name in FLOATS:
            arguments[name].requires_grad_()
        levels = torch.randint(0, 3, (len(lengths),), device=device) if with_levels else None
        count = int(ops.halting_units(arguments["mass"], arguments["cu_seqlens"], 1.0, mode).cu_units[-1])
        fused = ops.quantize_ragged(**arguments, levels=levels, mode=mode, total_units=count + spare)
        expected = composed(**arguments | wide, levels=levels, mode=mode, total_units=count + spare)
        for got, wanted in zip((*fused[:-1], *fused.units), (*expected[:-1], *expected[-1]), strict=True):
            if wanted.dtype == torch.float64:
                assert got.dtype == dtype
                assert_close(got, wanted, scale=10)
            else:
                assert got.dtype == wanted.dtype and torch.equal(got, wanted)

        direction = torch.randn_like(expected[1])
        gradients = []
        for result, leaves in ((fused, arguments), (expected, wide)):
            _, quantized, latents, commitment, codebook_loss, _, units = result
            loss = (quantized * direction).sum() + latents.exp().sum() + units.weights.square().sum()
            loss = loss + 2 * commitment + 3 * codebook_loss
            gradients.append(torch.autograd.grad(loss, [leaves[name] for name in FLOATS]))
        for got, wanted in zip(*gradients, strict=True):
            # sums over rows of products with 1 / |latent before it is normalised|: measured against the largest of them
            size = wanted.abs().max().clamp(min=1) if wanted.numel() else 1
            assert_close(got / size, wanted / size, scale=10)

    def test_a_case_by_hand(self, backend, device):
        hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 0.0]], device=device)
        result = ops.quantize_ragged(
            hidden,
            torch.tensor([0.5, 0.75, 0.25], device=device),
            torch.tensor([0, 3], device=device),
            end_weight=torch.zeros(2, 2, device=device),
            mean_weight=torch.eye(2, device=device),
            codebooks=torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.5, 0.5]]], device=device),
        )
        # unit 0: half of row 0, half of row 1; unit 1: a quarter of row 1 carried, a quarter of row 2
        rms = torch.tensor([[1.0], [2.125**0.5]])
        assert_close(result.latents, torch.tensor([[1.0, 1.0], [2.0, 0.5]]) / rms, scale=2)
        assert result.codes.tolist() == [[1], [2]]
        assert result.quantized.tolist() == [[1.0, 1.0], [1.5, 0.5]]
        assert result.usage.tolist() == [[0, 1, 1]]
        assert result.units.counts.tolist() == [2]

    def test_total_units_is_read_when_not_given(self, backend, device):
        arguments = ragged_inputs(device)
        result = ops.quantize_ragged(**arguments)
        count = int(result.units.cu_units[-1])
        assert result.codes.shape == (count, 2) and count == int(result.units.ends.sum())
        given_ = ops.quantize_ragged(**arguments, total_units=count)
        for a, b in zip((*result[:-1], *result.units), (*given_[:-1], *given_.units), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_mixed_precision(self, backend, device, dtype):
        """Low-precision hidden states are computed on in float32, beside float32 weights."""
        arguments = ragged_inputs(device, torch.float32)
        arguments["hidden"] = arguments["hidden"].to(dtype)
        low = ops.quantize_ragged(**arguments)
        high = ops.quantize_ragged(**arguments | {"hidden": arguments["hidden"].float()})
        assert low.latents.dtype == low.quantized.dtype == torch.float32
        assert torch.equal(low.codes, high.codes) and torch.equal(low.usage, high.usage)
        for field in ("quantized", "latents", "commitment", "codebook_loss"):
            assert_close(getattr(low, field), getattr(high, field))

    def test_packed_is_the_same_as_one_by_one(self, backend, device):
        lengths = [5, 0, 1, 7]
        arguments = ragged_inputs(device, torch.float32, lengths)
        packed = ops.quantize_ragged(**arguments)
        codes = []
        for hidden, mass in zip(arguments["hidden"].split(lengths), arguments["mass"].split(lengths), strict=True):
            cu_seqlens = torch.tensor([0, len(mass)], device=device)
            alone = ops.quantize_ragged(**arguments | {"hidden": hidden, "mass": mass, "cu_seqlens": cu_seqlens})
            codes.append(alone.codes)
        assert torch.equal(packed.codes, torch.cat(codes))

    @pytest.mark.dtype(torch.float64)
    def test_gradcheck(self, backend, device):
        arguments = ragged_inputs(device, torch.float64)
        leaves = tuple(arguments[name].requires_grad_() for name in FLOATS)

        def smooth(*floats):
            result = ops.quantize_ragged(**arguments | dict(zip(FLOATS, floats, strict=True)), total_units=13)
            return result.latents, result.units.weights

        # the step is a multiple of the fixed-point grid of the mass
        assert torch.autograd.gradcheck(smooth, leaves, eps=2**-18)

    @pytest.mark.parametrize("mode", ["fire", "stop"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_opcheck(self, backend, device, mode, dtype):
        """With gradients of the weights, which the samples of `test_every_op` make from the mass."""
        arguments = ragged_inputs(device, dtype)
        units = ops.halting_units(arguments.pop("mass"), arguments.pop("cu_seqlens"), 1.0, mode)
        hidden, *others = (tensor.requires_grad_() for tensor in arguments.values())
        levels = torch.tensor([1, 2, 0, 2], device=device)
        given = hidden, units.weights.requires_grad_(), units.unit, units.ends, units.cu_units, *others, levels, 13
        torch.library.opcheck(torch.ops.ztok.quantize_ragged.backend, (*given, backend))

    @pytest.mark.parametrize("mode", ["fire", "stop"])
    @pytest.mark.parametrize("total_units", [13, None])
    def test_units_are_taken_as_they_are_given(self, backend, device, mode, total_units):
        """The results and gradients of the mass, without another look for units."""
        arguments = ragged_inputs(device)
        leaves = [arguments[name].requires_grad_() for name in FLOATS]
        direct = ops.quantize_ragged(**arguments, mode=mode, total_units=total_units)
        units = ops.halting_units(arguments["mass"], arguments["cu_seqlens"], 1.0, mode)
        given = arguments | {"mass": None, "cu_seqlens": None, "units": units}
        with counted_calls() as counts, torch.no_grad():
            ops.quantize_ragged(**given, total_units=total_units)
        assert counts == {"quantize_ragged": 1}
        taken = ops.quantize_ragged(**given, total_units=total_units)
        assert taken.units is units
        for a, b in zip(taken[:-1], direct[:-1], strict=True):
            assert torch.equal(a, b)
        losses = [(r.quantized.sin().sum() + r.latents.exp().sum() + 3 * r.commitment) for r in (taken, direct)]
        for a, b in zip(*(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    def test_weights_of_given_units_are_the_callers(self, backend, device):
        arguments = ragged_inputs(device)
        units = ops.halting_units(arguments.pop("mass"), arguments.pop("cu_seqlens"))
        weights = torch.rand_like(units.weights).requires_grad_()
        units = units._replace(weights=weights)
        result = ops.quantize_ragged(mass=None, cu_seqlens=None, **arguments, units=units)
        means = ops.integrate_units(arguments["hidden"], units, len(result.codes))
        latents = arguments["hidden"][units.ends] @ arguments["end_weight"].T + means @ arguments["mean_weight"].T
        latents = latents / (latents.square().mean(1, keepdim=True) + 1e-6).sqrt()
        assert_close(result.latents, latents.detach(), scale=10)
        got, expected = (torch.autograd.grad(t.sin().sum(), weights)[0] for t in (result.latents, latents))
        assert_close(got, expected, scale=50)

    def test_halting_is_computed_once(self, backend, device):
        arguments = ragged_inputs(device)
        with counted_calls() as counts:
            ops.quantize_ragged(**arguments)
        assert counts == {"halting_units": 1, "quantize_ragged": 1}

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"hidden": torch.zeros(13)}, r"hidden must be a tensor \[T, D\]"),
            ({"hidden": torch.zeros(13, 6, dtype=torch.int32)}, "hidden must be of dtype"),
            ({"mass": torch.zeros(12)}, r"mass must be of size 13 in dimension 0 of \[T\] \(T of hidden\)"),
            ({"mass": torch.zeros(13, 1)}, r"mass must be a tensor \[T\]"),
            ({"mass": torch.full((13,), 2.0)}, r"mass must be in \[0, 1.0\]"),
            ({"mass": torch.zeros(13, device="meta")}, "mass must be on the device of hidden"),
            ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens must be 13 in its last element"),
            ({"cu_seqlens": torch.tensor([0.0, 13.0])}, "cu_seqlens must be of dtype"),
            ({"end_weight": torch.zeros(3)}, r"end_weight must be a tensor \[d, D\]"),
            (
                {"end_weight": torch.zeros(3, 5)},
                r"end_weight must be of size 6 in dimension 1 of \[d, D\] \(D of hidden\)",
            ),
            ({"end_weight": torch.zeros(3, 6, dtype=torch.int64)}, "end_weight must be of dtype"),
            ({"mean_weight": torch.zeros(2, 6)}, r"mean_weight must be of size 3 .* \(d of end_weight\)"),
            ({"mean_weight": torch.zeros(3, 6, device="meta")}, "mean_weight must be on the device of hidden"),
            ({"codebooks": torch.zeros(7, 3)}, r"codebooks must be a tensor \[L, V, d\]"),
            ({"codebooks": torch.zeros(2, 7, 4)}, r"codebooks must be of size 3 .* \(d of end_weight\)"),
            ({"codebooks": torch.full((2, 7, 3), torch.nan)}, "codebooks must be finite"),
            ({"levels": torch.tensor([1, 1])}, r"levels must be of size 4 in dimension 0 of \[B\] \(B of cu_seqlens\)"),
            ({"levels": torch.tensor([1, 1, 1, 9])}, r"levels must be in \[0, 2\] .*, got 9"),
            ({"threshold": -1.0}, "threshold must be a finite number above 0"),
            ({"mode": "go"}, "mode must be one of 'fire', 'stop'"),
            ({"total_units": 1}, "total_units must be at least"),
            ({"total_units": -1}, "total_units must be an integer of at least 0"),
            ({"units": 3, "mass": None, "cu_seqlens": None}, "units must be HaltingUnits, got int"),
            ({"units": 3}, r"mass must be None where units are given, got float32 \[13\]"),
            ({"units": 3, "mass": None}, "cu_seqlens must be None where units are given"),
            ({"mass": None}, "units must be given where mass or cu_seqlens is not, got None"),
        ],
    )
    def test_bad_input(self, backend, device, override, message, value_checks):
        """What halting alone asks for, `halting_units` refuses."""
        arguments = {"total_units": 13} | ragged_inputs("cpu", torch.float32) | override
        with pytest.raises(ValueError, match=f"(quantize_ragged|halting_units): {message}"):
            ops.quantize_ragged(**on(device, arguments))

    @pytest.mark.parametrize("field", ["ends", "unit", "weights", "cu_units"])
    def test_bad_units(self, backend, device, field):
        arguments = ragged_inputs(device)
        units = ops.halting_units(arguments["mass"], arguments["cu_seqlens"])
        bad = units._replace(**{field: getattr(units, field).to(torch.complex64)})
        with pytest.raises(ValueError, match=f"quantize_ragged: units.{field} must be of dtype"):
            ops.quantize_ragged(**arguments | {"mass": None, "cu_seqlens": None}, units=bad)

    @pytest.mark.parametrize("cu_units", [[1, 2], [0, 13, 12]])
    def test_offsets_of_units_that_are_none(self, backend, device, cu_units, value_checks):
        arguments = ragged_inputs(device)
        units = ops.halting_units(arguments["mass"], arguments["cu_seqlens"])
        bad = units._replace(cu_units=torch.tensor(cu_units, device=device))
        with pytest.raises(ValueError, match="quantize_ragged: units.cu_units must be (0 in its|non-decreasing)"):
            ops.quantize_ragged(**arguments | {"mass": None, "cu_seqlens": None}, units=bad, total_units=13)
