import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.ops.conftest import dtypes_of
from tests.ops.tolerances import assert_close
from ztok_fast import ops

HYPOTHESIS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    # a test of a class runs once per backend, each time on another instance of the class
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def slow_quantize(latents, codebooks, levels):
    """Row by row in float64: codes, quantized, loss, usage."""
    num_levels, size, width = codebooks.shape
    codes = torch.full((len(latents), num_levels), -1)
    usage = torch.zeros(num_levels, size, dtype=torch.int64)
    quantized = torch.zeros(len(latents), width, dtype=torch.float64)
    errors = []
    for row, latent in enumerate(latents.double()):
        for level in range(num_levels if levels is None else levels[row]):
            book = codebooks[level].double()
            code = int((latent - quantized[row] - book).square().sum(1).argmin())
            codes[row, level] = code
            usage[level, code] += 1
            quantized[row] += book[code]
            errors.append(float((latent - quantized[row]).square().sum()) / width)
    return codes, quantized, sum(errors) / max(1, len(errors)), usage


def autograd_quantize(latents, codebooks, codes):
    """Quantised rows and both losses for given codes, in terms that autograd differentiates by itself."""
    partial = torch.zeros_like(latents)
    commitment, codebook_loss = 0.0, 0.0
    for level, book in enumerate(codebooks):
        used = (codes[:, level] >= 0)[:, None]
        partial = partial + torch.where(used, book[codes[:, level].clamp(min=0).long()], 0)
        commitment = commitment + torch.where(used, (latents - partial.detach()).square(), 0).sum()
        codebook_loss = codebook_loss + torch.where(used, (latents.detach() - partial).square(), 0).sum()
    count = max(1, int((codes >= 0).sum())) * latents.shape[1]
    any_level = (codes >= 0).any(1, keepdim=True)
    straight_through = torch.where(any_level, latents + (partial - latents).detach(), 0)
    return straight_through, commitment / count, codebook_loss / count


def inputs(device, dtype=torch.float64, rows=9, size=7, width=5, levels=3):
    latents = torch.randn(rows, width).to(dtype).to(device).requires_grad_()
    codebooks = torch.randn(levels, size, width).to(dtype).to(device).requires_grad_()
    return latents, codebooks


def some_levels(rows, device, num_levels=3):
    return torch.arange(rows, dtype=torch.int32, device=device) % (num_levels + 1)


@pytest.mark.op("residual_quantize")
class TestResidualQuantize:
    @given(
        rows=st.integers(0, 12),
        size=st.integers(1, 9),
        width=st.integers(1, 6),
        num_levels=st.integers(1, 4),
        drop=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        seed=st.integers(0, 2**31),
    )
    @HYPOTHESIS
    def test_matches_slow_loops(self, backend, device, rows, size, width, num_levels, drop, dtype, seed):
        assume(dtype in dtypes_of("residual_quantize", backend))
        torch.manual_seed(seed)
        # multiples of 1/8: exact in every dtype, so that ties and codes are the same in all of them
        latents = torch.randint(-16, 17, (rows, width)) / 8
        codebooks = torch.randint(-16, 17, (num_levels, size, width)) / 8
        levels = torch.randint(0, num_levels + 1, (rows,)) if drop else None
        result = ops.residual_quantize(
            latents.to(dtype).to(device), codebooks.to(dtype).to(device), None if levels is None else levels.to(device)
        )
        codes, quantized, loss, usage = slow_quantize(latents, codebooks, levels)
        assert result.codes.dtype == torch.int32 and result.usage.dtype == torch.int64
        assert result.quantized.dtype == dtype
        assert result.commitment.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.codes.tolist() == codes.tolist()
        assert result.usage.tolist() == usage.tolist()
        assert_close(result.quantized, quantized)
        assert_close(result.commitment, torch.tensor(loss, dtype=torch.float64))
        assert_close(result.codebook_loss, torch.tensor(loss, dtype=torch.float64))

    def test_codes_are_those_of_codebook_assign(self, backend, device):
        latents, codebooks = inputs(device, torch.float32, rows=40, size=60, width=16)
        codes = ops.residual_quantize(latents, codebooks).codes
        assert torch.equal(codes, ops.codebook_assign(latents, codebooks).codes)

    @pytest.mark.parametrize("dropped", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_gradients_are_autograds(self, backend, device, dtype, dropped):
        latents, codebooks = inputs(device, dtype)
        levels = some_levels(9, device) if dropped else None
        direction = torch.randn(9, 5, dtype=torch.float64, device=device)
        result = ops.residual_quantize(latents, codebooks, levels)
        loss = (result.quantized * direction.to(dtype)).sum() + 3 * result.commitment + 5 * result.codebook_loss
        got = torch.autograd.grad(loss, (latents, codebooks))

        latents64, codebooks64 = (t.detach().double().requires_grad_() for t in (latents, codebooks))
        quantized, commitment, codebook_loss = autograd_quantize(latents64, codebooks64, result.codes)
        loss = (quantized * direction.to(dtype).double()).sum() + 3 * commitment + 5 * codebook_loss
        expected = torch.autograd.grad(loss, (latents64, codebooks64))
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, dtype, scale=5)

    @pytest.mark.dtype(torch.float64)
    def test_gradcheck_of_the_losses(self, backend, device):
        latents, codebooks = inputs(device)
        levels = some_levels(9, device)
        fixed_latents, fixed_codebooks = latents.detach(), codebooks.detach()
        assert torch.autograd.gradcheck(
            lambda z: ops.residual_quantize(z, fixed_codebooks, levels).commitment, (latents,)
        )
        assert torch.autograd.gradcheck(
            lambda c: ops.residual_quantize(fixed_latents, c, levels).codebook_loss, (codebooks,)
        )

    def test_each_loss_moves_its_own_side_only(self, backend, device):
        latents, codebooks = inputs(device, torch.float32)
        result = ops.residual_quantize(latents, codebooks)
        to_latents, to_codebooks = torch.autograd.grad(result.commitment, (latents, codebooks), retain_graph=True)
        assert (to_latents != 0).any() and (to_codebooks == 0).all()
        to_latents, to_codebooks = torch.autograd.grad(result.codebook_loss, (latents, codebooks))
        assert (to_latents == 0).all() and (to_codebooks != 0).any()

    def test_rows_without_levels(self, backend, device):
        latents, codebooks = inputs(device, torch.float32)
        levels = torch.zeros(9, dtype=torch.int64, device=device)
        result = ops.residual_quantize(latents, codebooks, levels)
        (result.quantized.sum() + result.commitment + result.codebook_loss).backward()
        assert (result.codes == -1).all() and (result.quantized == 0).all() and (result.usage == 0).all()
        assert result.commitment == 0 and result.codebook_loss == 0
        assert (latents.grad == 0).all() and (codebooks.grad == 0).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_not_finite(self, backend, device, bad):
        latents, codebooks = inputs(device, torch.float32)
        clean = ops.residual_quantize(latents, codebooks)
        broken = latents.detach().clone()
        broken[4, 0] = bad
        result = ops.residual_quantize(broken, codebooks)
        assert (result.codes[4] == 0).all() and result.commitment.isnan() and result.codebook_loss.isnan()
        assert torch.equal(result.codes[:4], clean.codes[:4]) and torch.equal(result.codes[5:], clean.codes[5:])

    def test_repeats_bitwise(self, backend, device):
        latents, codebooks = inputs(device, torch.float32, rows=200, size=30)
        runs = []
        for _ in range(2):
            result = ops.residual_quantize(latents, codebooks)
            loss = result.quantized.square().sum() + result.commitment + result.codebook_loss
            runs.append((*result, *torch.autograd.grad(loss, (latents, codebooks))))
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dropped", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_opcheck(self, backend, device, dtype, dropped):
        levels = some_levels(9, device) if dropped else None
        torch.library.opcheck(torch.ops.ztok.residual_quantize.default, (*inputs(device, dtype), levels))

    def test_compiles_in_full(self, backend, device):
        latents, codebooks = inputs(device, torch.float32)
        levels = some_levels(9, device)

        def loss(z, c):
            result = ops.residual_quantize(z, c, levels)
            return result.quantized.square().sum() + result.commitment + result.codebook_loss

        expected = torch.autograd.grad(loss(latents, codebooks), (latents, codebooks))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(compiled(latents, codebooks), (latents, codebooks))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"latents": torch.zeros(4)}, r"latents must be a tensor \[M, d\]"),
            ({"latents": torch.zeros(3, 4, dtype=torch.int32)}, "latents must be of dtype"),
            ({"codebooks": torch.zeros(5, 4)}, r"codebooks must be a tensor \[L, V, d\]"),
            ({"codebooks": torch.zeros(2, 5, 3)}, r"codebooks must be of size 4 .* \(the width of latents\)"),
            ({"codebooks": torch.zeros(2, 0, 4)}, "codebooks must be not empty"),
            ({"codebooks": torch.full((2, 5, 4), torch.inf)}, "codebooks must be finite"),
            ({"codebooks": torch.zeros(2, 5, 4, device="meta")}, "codebooks must be on the device of latents"),
            ({"levels": [1, 2, 2]}, r"levels must be a tensor \[M\], got list"),
            ({"levels": torch.ones(3)}, "levels must be of dtype int32, int64"),
            ({"levels": torch.ones(2, dtype=torch.int32)}, "levels must be of size 3 in dimension 0"),
            ({"levels": torch.tensor([0, 3, 1])}, r"levels must be in \[0, 2\] .*, got 3"),
            ({"levels": torch.tensor([0, -1, 1])}, r"levels must be in \[0, 2\] .*, got -1"),
            ({"levels": torch.tensor([0, 1, 1], device="meta")}, "levels must be on the device of latents"),
        ],
    )
    def test_bad_input(self, backend, device, override, message, monkeypatch):
        monkeypatch.setenv("ZTOK_DEBUG_CHECKS", "1")
        arguments = {"latents": torch.zeros(3, 4), "codebooks": torch.zeros(2, 5, 4)} | override
        with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
            ops.residual_quantize(**on(device, arguments))


def on(device, arguments):
    """Tensors among the arguments moved to the device, those on "meta" left there."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in arguments.items()
    }


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
            # sums over rows of products with 1 / |latent before it is normalised|
            assert_close(got, wanted, scale=100)

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
        arguments = ragged_inputs(device, dtype)
        for name in FLOATS:
            arguments[name].requires_grad_()
        levels = torch.tensor([1, 2, 0, 2], device=device)
        torch.library.opcheck(
            torch.ops.ztok.quantize_ragged.default, (*arguments.values(), levels, 1.0, mode, 13)
        )

    def test_compiles_in_full(self, backend, device):
        arguments = ragged_inputs(device)
        leaves = [arguments[name].requires_grad_() for name in FLOATS]

        def loss(*floats):
            result = ops.quantize_ragged(**arguments | dict(zip(FLOATS, floats, strict=True)), total_units=13)
            return result.quantized.square().sum() + result.commitment + result.codebook_loss

        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"hidden": torch.zeros(13)}, r"hidden must be a tensor \[T, D\]"),
            ({"hidden": torch.zeros(13, 6, dtype=torch.int32)}, "hidden must be of dtype"),
            ({"mass": torch.zeros(12)}, r"mass must be of size 13 in dimension 0 \(rows of hidden\)"),
            ({"mass": torch.zeros(13, 1)}, r"mass must be a tensor \[T\]"),
            ({"mass": torch.full((13,), 2.0)}, r"mass must be in \[0, 1.0\]"),
            ({"mass": torch.zeros(13, device="meta")}, "mass must be on the device of hidden"),
            ({"cu_seqlens": torch.tensor([0, 12])}, "cu_seqlens must be 13 in its last element"),
            ({"cu_seqlens": torch.tensor([0.0, 13.0])}, "cu_seqlens must be of dtype"),
            ({"end_weight": torch.zeros(3)}, r"end_weight must be a tensor \[d, D\]"),
            ({"end_weight": torch.zeros(3, 5)}, r"end_weight must be of size 6 in dimension 1 \(the width of hidden\)"),
            ({"end_weight": torch.zeros(3, 6, dtype=torch.int64)}, "end_weight must be of dtype"),
            ({"mean_weight": torch.zeros(2, 6)}, r"mean_weight must be of size 3 .* \(the width of codebooks\)"),
            ({"mean_weight": torch.zeros(3, 6, device="meta")}, "mean_weight must be on the device of hidden"),
            ({"codebooks": torch.zeros(7, 3)}, r"codebooks must be a tensor \[L, V, d\]"),
            ({"codebooks": torch.zeros(2, 7, 4)}, r"codebooks must be of size 3 .* \(the width of end_weight\)"),
            ({"codebooks": torch.full((2, 7, 3), torch.nan)}, "codebooks must be finite"),
            ({"levels": torch.tensor([1, 1])}, r"levels must be of size 4 in dimension 0 \(sequences\)"),
            ({"levels": torch.tensor([1, 1, 1, 9])}, r"levels must be in \[0, 2\] .*, got 9"),
            ({"threshold": -1.0}, "threshold must be a finite number above 0"),
            ({"mode": "go"}, "mode must be one of 'fire', 'stop'"),
            ({"total_units": 1}, "total_units must be at least"),
            ({"total_units": -1}, "total_units must be an integer of at least 0"),
        ],
    )
    def test_bad_input(self, backend, device, override, message, monkeypatch):
        monkeypatch.setenv("ZTOK_DEBUG_CHECKS", "1")
        arguments = {"total_units": 13} | ragged_inputs("cpu", torch.float32) | override
        with pytest.raises(ValueError, match=f"quantize_ragged: {message}"):
            ops.quantize_ragged(**on(device, arguments))
