"""spigan.ops.operation: one declaration gives an operator, its derivatives, a reference and a choice of backends."""

from __future__ import annotations

import itertools

import pytest
import torch

from spigan.ops import BackendUnavailable, backends, register_backend, use_backend
from spigan.ops.operation import Operation

CPU = torch.device("cpu")
_numbers = itertools.count()


def declare(name, *, kernel, limit=None, **derivatives):
    """An operation x -> scale x with a cpp kernel."""
    options = {} if limit is None else {"limit": limit}
    return Operation(
        f"{name}(Tensor x, float scale, str backend) -> Tensor",
        reference=lambda x, scale: x * scale,
        kernels={"cpp": kernel},
        fake=lambda args: torch.empty_like(args.x),
        **options,
        **derivatives,
    )


@pytest.fixture
def name(added_backends):
    return f"test_operation_{next(_numbers)}"  # torch.library keeps what is registered


def test_kernels_receive_the_schemas_arguments_by_name(name):
    seen = []

    def kernel(args):
        seen.append(args)
        return args.x * args.scale

    operation = declare(name, kernel=kernel)
    assert operation.name == name and name in backends.operations()
    assert operation.kernel is getattr(torch.ops.spigan, name).default
    x = torch.ones(3)
    assert operation.kernel(x, 2.0, "cpp").tolist() == [2.0] * 3
    assert seen[0]._fields == ("x", "scale", "backend")
    assert seen[0].x is not None and seen[0].scale == 2.0 and seen[0].backend == "cpp"


def test_choice_of_the_reference_a_kernel_or_a_function(name):
    operation = declare(name, kernel=lambda args: args.x * args.scale)
    x = torch.ones(3)
    assert operation.choose(None, CPU, (x,)) == ("cpp", None)
    chosen, reference = operation.choose("reference", CPU, (x,))
    assert chosen == "reference" and reference(x, 3.0).tolist() == [3.0] * 3
    register_backend("mine", {name: min})
    with use_backend("mine"):
        assert operation.choose(None, CPU, (x,)) == ("mine", min)
    with pytest.raises(BackendUnavailable, match=f"no triton implementation of {name} \\(it has: reference, cpp, mine"):
        operation.choose("triton", CPU, (x,))


def test_limits_are_asked_of_kernels_only(name):
    asked = []

    def limit(backend, least):
        asked.append((backend, least))
        return f"it accepts at least {least}" if least > 3 else None

    operation = declare(name, kernel=lambda args: args.x, limit=limit)
    assert operation.choose(None, CPU, (), 3)[0] == "cpp"
    assert operation.choose(None, CPU, (), 4)[0] == "reference"
    assert operation.choose("reference", CPU, (), 4)[0] == "reference"
    with pytest.raises(BackendUnavailable, match="it accepts at least 4"):
        operation.choose("cpp", CPU, (), 4)
    assert asked == [("cpp", 3), ("cpp", 4), ("cpp", 4)]


def test_transforms_are_for_the_reference(name):
    operation = declare(name, kernel=lambda args: args.x * args.scale)
    chosen = []

    def double(x):
        backend, function = operation.choose(None, CPU, (None, x))
        chosen.append(backend)
        return function(x, 2.0)

    torch.func.grad(lambda x: double(x).sum())(torch.ones(3))
    torch.func.jvp(double, (torch.ones(3),), (torch.ones(3),))
    assert chosen == ["reference", "reference"]
    with pytest.raises(BackendUnavailable, match=r"only the reference supports forward-mode derivatives"):
        torch.func.vmap(lambda x: operation.choose("cpp", CPU, (x,)))(torch.ones(3))


def test_derivatives(name):
    def setup_context(ctx, args, output):
        ctx.scale = args.scale

    def backward(ctx, grad):
        return grad * ctx.scale, None, None

    operation = declare(name, kernel=lambda args: args.x * args.scale, setup_context=setup_context, backward=backward)
    x = torch.randn(3, requires_grad=True)
    torch.library.opcheck(operation.kernel, (x, 0.5, "cpp"))
    (grad,) = torch.autograd.grad(operation.kernel(x, 0.5, "cpp").sum(), x)
    assert grad.tolist() == [0.5] * 3


def test_a_derivative_needs_a_context(name):
    with pytest.raises(ValueError, match="backward needs setup_context"):
        declare(name, kernel=lambda args: args.x, backward=lambda ctx, grad: (grad, None, None))


def test_kernels_run_without_autocast(name):
    def kernel(args):
        return args.x @ args.x  # with autocast: bfloat16

    operation = declare(name, kernel=kernel)
    with torch.autocast("cpu", torch.bfloat16):
        assert operation.kernel(torch.ones(3, 3), 1.0, "cpp").dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_stays_whole_under_compile_and_follows_the_choice(name):
    operation = declare(name, kernel=lambda args: args.x * args.scale)

    def double(x):
        backend, function = operation.choose(None, x.device, (x,))
        return operation.kernel(x, 2.0, backend) if function is None else function(x, 2.0)

    nodes = []

    def record(graph_module, inputs):
        nodes.append(any(name in str(node.target) for node in graph_module.graph.nodes))
        return graph_module.forward

    compiled = torch.compile(double, backend=record, fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [2.0] * 3
    with use_backend("reference"):
        assert compiled(torch.ones(3)).tolist() == [2.0] * 3
    assert nodes == [True, False]
