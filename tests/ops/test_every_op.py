"""What every op promises, for each backend, from the op's own specification (`Spec`)."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ztok_fast
from tests.ops.conftest import backend_cases
from ztok_fast.ops.op import OPS
from ztok_fast.ops.spec import close

SPECIFIED = {name: op for name, op in OPS.items() if op.spec is not None}
DIFFERENTIABLE = {name: op for name, op in SPECIFIED.items() if op.backward is not None}


def name_of(sizes):
    return ",".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in sizes.items())


def samples(ops, dtypes=None):
    """(op, backend, device, sizes, dtype) for every sample of every op; half precision for every second one."""
    for name, op in ops.items():
        for backend in backend_cases(name):
            taken = next(b.dtypes for b in op.backends if b.name == backend.values[0])
            for i, sizes in enumerate(op.spec.samples):
                for dtype in op.spec.dtypes:
                    wanted = dtype in (dtypes or op.spec.dtypes) and (dtype.itemsize > 2 or i % 2 == 0)
                    if dtype in taken and wanted:
                        label = f"{name}-{backend.id}-{name_of(sizes)}-{str(dtype).removeprefix('torch.')}"
                        yield pytest.param(name, *backend.values, sizes, dtype, id=label, marks=backend.marks)


ARGUMENTS = ("name", "choice", "device", "sizes", "dtype")


def make(name, sizes, dtype, device="cpu", grad=False, double=False):
    """Inputs of a sample; with `grad` the differentiable ones are leaves. `double`: the same values in float64."""
    spec = OPS[name].spec
    inputs = spec.make(sizes, dtype, torch.Generator(device).manual_seed(0))

    def leaf(value):
        if isinstance(value, (list, tuple)):
            return [leaf(v) for v in value]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.double() if double else value
        return value.detach().requires_grad_() if grad else value

    return {key: leaf(value) if key in spec.differentiable or double else value for key, value in inputs.items()}


def leaves(spec, inputs):
    found = [inputs[key] for key in spec.differentiable]
    flat = [t for value in found for t in (value if isinstance(value, list) else [value])]
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def gradients(spec, inputs, generator, **options):
    """Gradients of all leaves for random gradients of the outputs."""
    outputs = [o for o in spec.outputs(spec.public(**inputs)) if o.requires_grad]
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return torch.autograd.grad(outputs, leaves(spec, inputs), weights, allow_unused=True, **options)


@contextmanager
def forced(choice, ops):
    """Skips what the backend's condition on the arguments leaves to another."""
    try:
        with ztok_fast.backend(choice, ops=ops):
            yield
    except ztok_fast.ops.BackendUnavailable as error:
        if "runs only where" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize(ARGUMENTS, list(samples(SPECIFIED)))
def test_results_are_exact(name, choice, device, sizes, dtype):
    spec = OPS[name].spec
    inputs = make(name, sizes, dtype, device)
    with forced(choice, [name]):
        result = spec.public(**inputs)
    if spec.check is not None:
        return spec.check(inputs, result)
    with ztok_fast.backend("reference"):
        expected = spec.public(**make(name, sizes, dtype, device, double=True))
    for got, wanted in zip(spec.outputs(result), spec.outputs(expected), strict=True):
        close(got, wanted, dtype, spec.tolerance)


@pytest.mark.parametrize(ARGUMENTS, list(samples(DIFFERENTIABLE, (torch.float32, torch.bfloat16))))
def test_gradients_are_those_of_the_reference(name, choice, device, sizes, dtype):
    """Decisions (codes, units) are the backend's own in both, so that the gradients are of the same function."""
    op = OPS[name]
    backward = [f"{name}_backward"] if f"{name}_backward" in OPS else []
    found = []
    for forward in (choice, "reference"):
        own = backward and OPS[backward[0]].has(forward)
        with forced(forward, [name]), ztok_fast.backend(forward if own else "reference", ops=backward):
            inputs = make(name, sizes, dtype, device, grad=True)
            found.append(gradients(op.spec, inputs, torch.Generator().manual_seed(1)))
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and got.numel():
            size = wanted.double().square().mean().sqrt().clamp(min=1)
            close(got / size, wanted / size, dtype, 4 * op.spec.tolerance, "gradient")


@pytest.mark.parametrize("name", SPECIFIED)
def test_opcheck(name):
    """Both overloads; gradients too where the op has them."""
    op = OPS[name]
    for sizes in op.spec.samples[:2]:
        inputs = make(name, sizes, torch.float32, grad=op.backward is not None)
        for overload, args in captured_calls(op, inputs):
            torch.library.opcheck(overload, args)


def captured_calls(op, inputs):
    """The calls of the registered op that the public function makes on `inputs`, for each overload and backend."""
    calls = []

    class Capture(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op.by_name:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    with Capture():
        op.spec.public(**inputs)
    assert calls, f"{op.name} was never called"
    *args, _ = calls[0]
    args = [_like_leaf(a, inputs) for a in args]
    yield op.default, tuple(args)
    for backend in ("", "reference"):
        yield op.by_name, (*args, backend)


def _tensors(inputs):
    return [t for v in inputs.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]


def _like_leaf(value, inputs):
    """The argument as a leaf that requires a gradient if an input does that shares its memory."""
    if isinstance(value, (list, tuple)):
        return [_like_leaf(v, inputs) for v in value]
    if isinstance(value, Tensor) and any(
        t.requires_grad and t.data_ptr() == value.data_ptr() and t.dtype == value.dtype for t in _tensors(inputs)
    ):
        return value.detach().clone().requires_grad_()
    return value


@pytest.mark.parametrize("name", SPECIFIED)
def test_compiles_to_one_graph(name):
    op = OPS[name]
    sizes = op.spec.samples[1]
    inputs = make(name, sizes, torch.float32, grad=op.backward is not None)

    def call():
        return op.spec.outputs(op.spec.public(**inputs))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(), call(), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    if op.backward is not None:
        found = []
        for function in (compiled, call):
            outputs = [o for o in function() if o.requires_grad]
            found.append(torch.autograd.grad(outputs, leaves(op.spec, inputs), [torch.ones_like(o) for o in outputs]))
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_agrees_with_backward_mode(name):
    """`torch.func.jvp` and dual tensors: a zero tangent was silently wrong once."""
    op = OPS[name]
    inputs = make(
        name, op.spec.samples[1], torch.float64 if torch.float64 in op.spec.dtypes else torch.float32, grad=True
    )
    primals = leaves(op.spec, inputs)
    generator = torch.Generator().manual_seed(2)
    tangents = [torch.randn(p.shape, generator=generator).to(p) for p in primals]

    def total(*values):
        replaced = iter(values)

        def put(value):
            if isinstance(value, list):
                return [put(v) for v in value]
            return next(replaced) if isinstance(value, Tensor) and value.requires_grad else value

        given = {key: put(value) if key in op.spec.differentiable else value for key, value in inputs.items()}
        outputs = [o for o in op.spec.outputs(op.spec.public(**given)) if o.is_floating_point()]
        return sum((o.to(primals[0].dtype) * torch.arange(1, o.numel() + 1).view(o.shape)).sum() for o in outputs)

    grads = torch.autograd.grad(total(*primals), primals)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents))
    detached = [p.detach() for p in primals]
    _, tangent = torch.func.jvp(total, tuple(detached), tuple(tangents))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = total(*(torch.autograd.forward_ad.make_dual(p, t) for p, t in zip(detached, tangents)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(torch.func.grad(total, argnums=tuple(range(len(primals))))(*detached), grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_those_of_the_reference(name):
    op = OPS[name]
    found = []
    for backend in (None, "reference"):
        inputs = make(name, op.spec.samples[1], torch.float32, grad=True)
        with ztok_fast.backend(backend) if backend else torch.enable_grad():
            first = gradients(op.spec, inputs, torch.Generator().manual_seed(1), create_graph=True)
            first = [g for g in first if g is not None and g.requires_grad]
            if not first:
                pytest.skip(f"{name} is linear")
            total = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(total, leaves(op.spec, inputs), allow_unused=True))
    for got, wanted in zip(*found, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, op in SPECIFIED.items() if op.backward is None])
def test_an_op_without_gradients_says_so(name):
    op = OPS[name]
    inputs = op.spec.make(op.spec.samples[1], torch.float32, torch.Generator().manual_seed(0))
    tensors = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    if not tensors:
        pytest.skip("no floating-point input")
    key = tensors[0]

    def call(value):
        return op.spec.outputs(op.spec.public(**{**inputs, key: value}))[0].float().sum()

    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.func.jvp(call, (inputs[key],), (torch.ones_like(inputs[key]),))
    leaf = inputs[key].clone().requires_grad_()
    result = call(leaf)
    if result.requires_grad:
        with pytest.raises(RuntimeError, match="not differentiable"):
            result.backward()
