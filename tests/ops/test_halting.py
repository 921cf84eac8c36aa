import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.tolerances import assert_close, gradcheck
from ztok_fast import ops

ONE = 1 << 20
MODES = ("fire", "stop")
HYPOTHESIS = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    # a test of a class runs once per backend, each time on another instance of the class
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def offsets(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype, device=device)


def oracle(mass, lengths, threshold, mode):
    """Row by row with Python integers: ends, unit, weights, counts."""
    ends, unit, weights, counts = [], [], [], []
    next_unit, start = 0, 0
    for length in lengths:
        rows = [float(value) for value in mass[start : start + length]]
        start += length
        first_unit, filled, stopped = next_unit, 0, False
        for t, value in enumerate(rows):
            last = t == length - 1
            if mode == "stop":
                unit.append(-1 if stopped else next_unit)
                weights.append((0.0 if stopped else value, 0.0))
                ending = not stopped and (value >= threshold or last)
                stopped = stopped or ending
            else:
                quanta = min(round(value * (ONE / threshold)), ONE)
                unit.append(next_unit)
                fires = filled + quanta >= ONE
                own = ONE - filled if fires else quanta
                filled = filled + quanta - ONE if fires else filled + quanta
                weights.append((own * threshold / ONE, filled * threshold / ONE if fires and not last else 0.0))
                ending = fires or last
            ends.append(ending)
            next_unit += ending
        counts.append(next_unit - first_unit)
    return ends, unit, weights, counts


def check(units, mass, lengths, threshold, mode):
    ends, unit, weights, counts = oracle(mass.double().cpu(), lengths, threshold, mode)
    assert units.ends.dtype == torch.bool and units.unit.dtype == torch.int32
    assert units.counts.dtype == units.cu_units.dtype == torch.int32
    assert units.ends.tolist() == ends
    assert units.unit.tolist() == unit
    assert units.counts.tolist() == counts
    assert units.cu_units.tolist() == offsets(counts).tolist()
    expected = torch.tensor(weights, dtype=torch.float64).reshape(-1, 2)
    assert_close(units.weights, expected)


def random_mass(lengths, threshold=1.0, dtype=torch.float32):
    # a third of the rows at 0 or at the threshold: exact hits and units that nothing is added to
    mass = torch.rand(sum(lengths))
    kind = torch.randint(0, 6, mass.shape)
    mass[kind == 0], mass[kind == 1] = 0.0, 1.0
    return (mass.to(dtype) * torch.tensor(threshold).to(dtype)).clamp(max=torch.tensor(threshold).to(dtype))


lengths_strategy = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(2, 30)), min_size=0, max_size=6)


@pytest.mark.op("halting_units")
class TestHaltingUnits:
    @given(
        lengths=lengths_strategy,
        seed=st.integers(0, 2**31),
        threshold=st.sampled_from([1.0, 0.3, 7.5]),
        mode=st.sampled_from(MODES),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    )
    @HYPOTHESIS
    def test_matches_oracle(self, backend, device, lengths, seed, threshold, mode, dtype):
        torch.manual_seed(seed)
        mass = random_mass(lengths, threshold, dtype).to(device)
        units = ops.halting_units(mass, offsets(lengths, device), threshold, mode)
        assert units.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(units, mass, lengths, threshold, mode)

    @given(lengths=lengths_strategy, seed=st.integers(0, 2**31))
    @HYPOTHESIS
    def test_fire_invariants(self, backend, device, lengths, seed):
        torch.manual_seed(seed)
        mass, threshold = random_mass(lengths, 1.0), 1.0
        cu_seqlens = offsets(lengths, device, torch.int64)
        units = ops.halting_units(mass.to(device), cu_seqlens, threshold)
        total = int(units.cu_units[-1])
        # every row in exactly one unit, units in order, one end each
        assert units.unit.tolist() == (units.ends.cumsum(0) - units.ends.int()).tolist()
        assert int(units.ends.sum()) == total
        sums = torch.zeros(total + 1, dtype=torch.float64)
        sums.index_add_(0, units.unit.cpu().long(), units.weights[:, 0].cpu().double())
        sums.index_add_(0, units.unit.cpu().long() + 1, units.weights[:, 1].cpu().double())
        last_units = units.cu_units[1:].cpu()[units.counts.cpu() > 0] - 1
        complete = torch.ones(total, dtype=torch.bool)
        complete[last_units.long()] = False
        # with threshold 1 the weights are multiples of 2**-20: their sums are exact
        assert (sums[:total][complete] == threshold).all()
        assert (sums[:total] <= threshold).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_packed_is_the_same_as_one_by_one(self, backend, device, mode):
        lengths = [5, 0, 1, 17, 8, 0]
        mass = random_mass(lengths).to(device)
        packed = ops.halting_units(mass, offsets(lengths, device), 1.0, mode)
        for i, rows in enumerate(mass.split(lengths)):
            alone = ops.halting_units(rows, offsets([len(rows)], device), 1.0, mode)
            span = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
            first = int(packed.cu_units[i])
            assert torch.equal(packed.weights[span], alone.weights)
            assert torch.equal(packed.ends[span], alone.ends)
            assert torch.equal(packed.unit[span], torch.where(alone.unit < 0, -1, alone.unit + first))
            assert int(packed.counts[i]) == int(alone.counts[0])

    def test_many_small_masses_add_up_exactly(self, backend, device):
        """Float32 prefix sums would drift over this length; fixed point must not."""
        length = 200_003
        mass = torch.full((length,), 0.1, device=device)
        units = ops.halting_units(mass, offsets([length], device))
        quanta = round(float(torch.tensor(0.1)) * ONE)
        complete, rest = divmod(length * quanta, ONE)
        assert rest >= quanta, "the last row must not fire, so that a part unit follows"
        assert int(units.counts[0]) == complete + 1

    def test_repeats_bitwise(self, backend, device):
        mass, cu_seqlens = random_mass([100, 3]).to(device), offsets([100, 3], device)
        for a, b in zip(ops.halting_units(mass, cu_seqlens), ops.halting_units(mass, cu_seqlens), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("threshold", [1.0, 2.0])
    def test_gradcheck(self, backend, device, mode, threshold):
        mass, lengths = grid_mass(device, threshold)
        cu_seqlens = offsets(lengths, device)
        # the weights are piecewise linear on a grid of threshold / 2**20: steps must be multiples of it
        assert gradcheck(
            lambda m: ops.halting_units(m, cu_seqlens, threshold, mode).weights,
            (mass,),
            backend,
            device,
            eps=threshold * 2**-16,
        )

    def test_gradient_of_a_carry(self, backend, device):
        mass = torch.tensor([0.75, 0.5, 0.25, 0.75], device=device, requires_grad=True)
        weights = ops.halting_units(mass, offsets([4], device)).weights
        assert weights.tolist() == [[0.75, 0], [0.25, 0.25], [0.25, 0], [0.5, 0]]
        jacobian = [torch.autograd.grad(w, mass, retain_graph=True)[0].tolist() for w in weights.flatten()]
        assert jacobian == [
            [1, 0, 0, 0],
            [0, 0, 0, 0],
            [-1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 0],
            [-1, -1, -1, 0],
            [0, 0, 0, 0],
        ]

    def test_gradient_does_not_cross_sequences(self, backend, device):
        mass = torch.full((20,), 0.3, device=device, requires_grad=True)
        weights = ops.halting_units(mass, offsets([7, 6, 7], device)).weights
        weights[7:13].square().sum().backward()
        assert (mass.grad[:7] == 0).all() and (mass.grad[13:] == 0).all() and (mass.grad[7:12] != 0).any()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"mass": torch.zeros(2, 2)}, r"mass must be a tensor \[T\]"),
            ({"mass": torch.zeros(4, dtype=torch.int32)}, "mass must be of dtype"),
            ({"mass": torch.tensor([0.0, 1.5, 0.0, 0.0])}, r"mass must be in \[0, 1.0\] .*, got 1.5 in row 1"),
            ({"mass": torch.tensor([0.0, 0.0, -0.5, 0.0])}, r"mass must be in \[0, 1.0\] .*, got -0.5 in row 2"),
            ({"mass": torch.tensor([torch.nan, 0.0, 0.0, 0.0])}, r"mass must be in \[0, 1.0\] .*, got nan in row 0"),
            ({"mass": torch.tensor([torch.inf, 0, 0, 0]), "mode": "stop"}, "mass must be finite and at least 0"),
            ({"cu_seqlens": [0, 4]}, r"cu_seqlens must be a tensor \[B \+ 1\], got list"),
            ({"cu_seqlens": torch.tensor([[0, 4]])}, r"cu_seqlens must be a tensor \[B \+ 1\]"),
            ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens must be of dtype int32, int64"),
            ({"cu_seqlens": torch.empty(0, dtype=torch.int32)}, "cu_seqlens must be a tensor .* at least one element"),
            ({"cu_seqlens": torch.tensor([1, 4])}, "cu_seqlens must be 0 in its first element, got 1"),
            ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must be non-decreasing, got 3 followed by 2"),
            ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens must be 4 in its last element .*, got 3"),
            ({"cu_seqlens": torch.tensor([0, 4], device="meta")}, "cu_seqlens must be on the device of mass"),
            ({"threshold": 0.0}, "threshold must be a finite number above 0, got 0.0"),
            ({"threshold": float("nan")}, "threshold must be a finite number above 0"),
            ({"mode": "halt"}, "mode must be one of 'fire', 'stop', got 'halt'"),
        ],
    )
    def test_bad_input(self, backend, device, override, message, monkeypatch):
        monkeypatch.setenv("ZTOK_DEBUG_CHECKS", "1")
        arguments = {"mass": torch.zeros(4), "cu_seqlens": torch.tensor([0, 4])} | override
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                arguments[name] = value.to(device)
        with pytest.raises(ValueError, match=f"halting_units: {message}"):
            ops.halting_units(**arguments)


def grid_mass(device, threshold):
    """Float64 mass whose prefix sums stay away from multiples of the threshold, so that small steps change no unit."""
    lengths = [7, 0, 1, 6]
    sixteenths = torch.tensor([5, 7, 9, 3, 11, 6, 14, 3, 15, 2, 1, 13, 6, 5], dtype=torch.float64, device=device)
    starts = [0, 7, 8]
    mass = sixteenths / 16
    for start in starts:
        mass[start] += 1 / 64
    return (mass * threshold).requires_grad_(), lengths


def slow_means(rows, units, total_units):
    means = torch.zeros(total_units, rows.shape[1], dtype=torch.float64)
    totals = torch.zeros(total_units, dtype=torch.float64)
    weights, unit = units.weights.double().cpu(), units.unit.tolist()
    for t, row in enumerate(rows.double().cpu()):
        for share, k in ((weights[t, 0], unit[t]), (weights[t, 1], unit[t] + 1)):
            if share > 0:
                means[k] += share * row
                totals[k] += share
    return torch.where(totals[:, None] > 0, means / totals[:, None], 0)


@pytest.mark.op("integrate_units")
class TestIntegrateUnits:
    @given(
        lengths=lengths_strategy,
        seed=st.integers(0, 2**31),
        width=st.integers(1, 5),
        mode=st.sampled_from(MODES),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        spare=st.integers(0, 3),
    )
    @HYPOTHESIS
    def test_matches_oracle(self, backend, device, lengths, seed, width, mode, dtype, spare):
        torch.manual_seed(seed)
        mass = random_mass(lengths).to(device)
        units = ops.halting_units(mass, offsets(lengths, device), 1.0, mode)
        rows = torch.randn(sum(lengths), width).to(dtype).to(device)
        total_units = int(units.cu_units[-1]) + spare
        means = ops.integrate_units(rows, units, total_units)
        assert means.dtype == dtype
        # shares of 2**-20 next to ones of 1 cost nothing; float32 sums of at most 30 rows do
        assert_close(means, slow_means(rows, units, total_units), torch.float32 if dtype == torch.float64 else dtype, 4)
        assert (means[total_units - spare :] == 0).all()

    def test_not_a_number_stays_in_its_sequence(self, backend, device):
        lengths = [4, 4]
        mass = torch.full((8,), 0.6, device=device)
        units = ops.halting_units(mass, offsets(lengths, device))
        rows = torch.ones(8, 3, device=device)
        rows[:4] = torch.nan
        means = ops.integrate_units(rows, units, int(units.cu_units[-1]))
        first = int(units.cu_units[1])
        assert means[:first].isnan().all() and torch.equal(means[first:], torch.ones_like(means[first:]))

    def test_rows_after_the_stop_do_not_count(self, backend, device):
        mass = torch.tensor([0.5, 1.0, 0.5, 0.25], device=device)
        units = ops.halting_units(mass, offsets([4], device), 1.0, "stop")
        rows = torch.tensor([[3.0], [6.0], [torch.nan], [torch.inf]], device=device)
        assert ops.integrate_units(rows, units, 1).tolist() == [[5.0]]

    def test_unit_without_weight_is_zero_and_has_no_gradient(self, backend, device):
        mass = torch.zeros(3, device=device, requires_grad=True)
        rows = torch.ones(3, 2, device=device, requires_grad=True)
        means = ops.integrate_units(rows, ops.halting_units(mass, offsets([3], device)), 1)
        means.sum().backward()
        assert (means == 0).all() and (rows.grad == 0).all() and (mass.grad == 0).all()

    def test_packed_is_the_same_as_one_by_one(self, backend, device):
        lengths = [5, 0, 1, 17, 8]
        mass, rows = random_mass(lengths).to(device), torch.randn(31, 6).to(device)
        units = ops.halting_units(mass, offsets(lengths, device))
        packed = ops.integrate_units(rows, units, int(units.cu_units[-1]))
        assert torch.equal(packed, ops.integrate_units(rows, units, int(units.cu_units[-1])))
        for i, (m, r) in enumerate(zip(mass.split(lengths), rows.split(lengths), strict=True)):
            alone = ops.halting_units(m, offsets([len(m)], device))
            span = slice(int(units.cu_units[i]), int(units.cu_units[i + 1]))
            assert torch.equal(packed[span], ops.integrate_units(r, alone, span.stop - span.start))

    @pytest.mark.parametrize("mode", MODES)
    def test_gradcheck(self, backend, device, mode):
        mass, lengths = grid_mass(device, 1.0)
        units = ops.halting_units(mass.detach(), offsets(lengths, device), 1.0, mode)
        rows = torch.randn(len(mass), 3, dtype=torch.float64, device=device, requires_grad=True)
        total_units = int(units.cu_units[-1]) + 1
        # a weight where no share exists counts for nothing, and so its gradient is 0
        weights = units.weights.clone().requires_grad_()
        assert gradcheck(
            lambda r, w: ops.integrate_units(r, units._replace(weights=w), total_units),
            (rows, weights),
            backend,
            device,
        )

    def test_gradcheck_through_halting(self, backend, device):
        mass, lengths = grid_mass(device, 1.0)
        cu_seqlens = offsets(lengths, device)
        rows = torch.randn(len(mass), 3, dtype=torch.float64, device=device, requires_grad=True)
        assert gradcheck(
            lambda r, m: ops.integrate_units(r, ops.halting_units(m, cu_seqlens), 12),
            (rows, mass),
            backend,
            device,
            eps=2**-18,
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_match_float64(self, backend, device, dtype):
        mass, lengths = grid_mass(device, 1.0)
        mass = mass.detach().float()
        rows = torch.randn(len(mass), 3).to(dtype).to(device)
        gradient = torch.randn(12, 3).to(dtype).to(device)
        results = []
        for target in (dtype, torch.float64):
            r = rows.to(target).requires_grad_()
            m = mass.to(torch.promote_types(target, torch.float32)).requires_grad_()
            means = ops.integrate_units(r, ops.halting_units(m, offsets(lengths, device)), 12)
            results.append(torch.autograd.grad(means, (r, m), gradient.to(target)))
        for got, expected in zip(*results, strict=True):
            assert_close(got, expected, dtype, scale=20)

    def test_compiles_in_full(self, backend, device):
        mass, lengths = grid_mass(device, 1.0)
        cu_seqlens = offsets(lengths, device)
        rows = torch.randn(len(mass), 3, dtype=torch.float64, device=device, requires_grad=True)

        def loss(r, m):
            return ops.integrate_units(r, ops.halting_units(m, cu_seqlens), 12).square().sum()

        expected = torch.autograd.grad(loss(rows, mass), (rows, mass))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(torch.autograd.grad(compiled(rows, mass), (rows, mass)), expected, strict=True):
            torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"rows": torch.zeros(4)}, r"rows must be a tensor \[T, D\]"),
            ({"rows": torch.zeros(4, 2, dtype=torch.int32)}, "rows must be of dtype"),
            ({"rows": torch.zeros(3, 2)}, "units.ends must be of size 3 in dimension 0"),
            ({"rows": torch.zeros(4, 2, device="meta")}, "units.ends must be on the device of rows"),
            ({"units": None}, "units must be HaltingUnits, got NoneType"),
            ({"total_units": 1}, "total_units must be at least 2"),
            ({"total_units": -1}, "total_units must be an integer of at least 0"),
            ({"total_units": 2.0}, "total_units must be an integer of at least 0"),
        ],
    )
    def test_bad_input(self, backend, device, override, message, monkeypatch):
        monkeypatch.setenv("ZTOK_DEBUG_CHECKS", "1")
        units = ops.halting_units(torch.full((4,), 0.5, device=device), offsets([4], device))
        arguments = {"rows": torch.zeros(4, 2), "units": units, "total_units": 2} | override
        if arguments["rows"].device.type == "cpu":
            arguments["rows"] = arguments["rows"].to(device)
        with pytest.raises(ValueError, match=f"integrate_units: {message}"):
            ops.integrate_units(**arguments)

    @pytest.mark.parametrize("cu_units", [[1, 2], [0, 3, 2]])
    def test_offsets_of_units_that_are_none(self, backend, device, cu_units, value_checks):
        units = ops.halting_units(torch.full((4,), 0.5, device=device), offsets([4], device))
        bad = units._replace(cu_units=torch.tensor(cu_units, device=device))
        with pytest.raises(ValueError, match="integrate_units: units.cu_units must be (0 in its|non-decreasing)"):
            ops.integrate_units(torch.zeros(4, 2, device=device), bad, 4)

    def test_a_unit_without_rows_is_zero(self, backend, device):
        units = ops.halting_units(torch.full((4,), 0.5, device=device), offsets([4], device))
        units = units._replace(unit=torch.tensor([0, 0, 2, 2], device=device), cu_units=offsets([3], device))
        means = ops.integrate_units(torch.ones(4, 2, device=device), units, 4)
        assert means[1].tolist() == [0, 0] and means[3].tolist() == [0, 0] and means[0].tolist() == [1, 1]

    @pytest.mark.parametrize("field", ["ends", "unit", "weights", "cu_units"])
    def test_bad_units(self, backend, device, field):
        units = ops.halting_units(torch.full((4,), 0.5, device=device), offsets([4], device))
        rows = torch.zeros(4, 2, device=device)
        bad = units._replace(**{field: getattr(units, field).to(torch.complex64)})
        with pytest.raises(ValueError, match=f"integrate_units: units.{field} must be of dtype"):
            ops.integrate_units(rows, bad, 2)
        bad = units._replace(weights=torch.zeros(4, 3, device=device))
        with pytest.raises(ValueError, match="units.weights must be of size 2 in dimension 1"):
            ops.integrate_units(rows, bad, 2)
