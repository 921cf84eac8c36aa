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
        to_latents, to_codebooks = torch.autograd.grad(
            result.commitment, (latents, codebooks), retain_graph=True, materialize_grads=True
        )
        assert (to_latents != 0).any() and (to_codebooks == 0).all()
        to_latents, to_codebooks = torch.autograd.grad(
            result.codebook_loss, (latents, codebooks), materialize_grads=True
        )
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

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"latents": torch.zeros(4)}, r"latents must be a tensor \[M, d\]"),
            ({"latents": torch.zeros(3, 4, dtype=torch.int32)}, "latents must be of dtype"),
            ({"codebooks": torch.zeros(5, 4)}, r"codebooks must be a tensor \[L, V, d\]"),
            ({"codebooks": torch.zeros(2, 5, 3)}, r"codebooks must be of size 4 .* \(d of latents\)"),
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
