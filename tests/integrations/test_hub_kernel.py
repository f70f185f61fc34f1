"""The package for the Hub's kernel loader: whole by itself, the same results, layers without state."""

import ast
import importlib.util
import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from scalelong_fast import ops
from scalelong_fast.errors import UserError
from scalelong_fast.integrations.hub_kernel import build_hub_kernel
from scalelong_fast.integrations.hub_kernel.__main__ import main
from scalelong_fast.ops.examples import SHAPES, example_arguments, example_gradients

LAYERS = ("ScaleConcat", "LSScaleConcat", "ScaleConcatLinear", "ScaleConcatGroupNorm")
TOKENS, IMAGES, FEATURE, GATES = (2, 3, 16), (1, 4, 4, 3, 2), (1, 8, 3, 2), (2, 16)

#: Plans with a kernel of ours that takes float32, where the first is none; the convolution's plans are all PyTorch's.
KERNELS = {"scale_concat_linear": "pointer", "ls_skip_linear": "pointer"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return build_hub_kernel(tmp_path_factory.mktemp("hub") / "repository", version=2)


@pytest.fixture(scope="module")
def variant(repository):
    return repository / "build" / "torch-universal"


def load(variant, name):
    """Import the package as the loader does: from its file, under a name that is not its own."""
    spec = importlib.util.spec_from_file_location(name, variant / "scalelong_fast" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(variant):
    """The package, beside ``scalelong_fast`` itself."""
    before = set(sys.modules)
    yield load(variant, "_kernel_under_test")
    for name in set(sys.modules) - before:
        if name.startswith("_kernel_under_test"):
            del sys.modules[name]


def test_what_the_loader_reads_first(repository, variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata.pop("id").startswith("_scalelong_fast_")
    assert metadata == {
        **{"name": "scalelong-fast", "version": 2, "license": "Apache-2.0"},
        **{"python-depends": [], "backend": {"type": "cuda"}},
    }
    card = (repository / "README.md").read_text()
    assert "library_name: kernels" in card
    assert 'get_kernel("USER/scalelong-fast", version=2' in card


def test_everything_imported_is_relative_or_torch_or_triton_or_of_python(variant):
    files = list(variant.rglob("*.py"))
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top in ("torch", "triton") or top in sys.stdlib_module_names, (file.name, name)


def test_it_works_where_scalelong_fast_is_not_installed(variant, tmp_path):
    code = f"""
import importlib.util, sys
sys.modules["scalelong_fast"] = None  # an import of it fails
import torch
spec = importlib.util.spec_from_file_location("anything", {str(variant / "scalelong_fast" / "__init__.py")!r})
module = sys.modules["anything"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "anything.kernels.concat" not in sys.modules  # no kernel is defined before it is launched
x, skip = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4, requires_grad=True)
out = module.scale_concat(x, skip, 0.5)
assert torch.equal(out, torch.cat([x, 0.5 * skip], 1))
out.sum().backward()
assert (skip.grad == 0.5).all()
with module.force_plan("triton"):
    assert torch.equal(module.scale_concat(x, skip, 0.5), out)
print("all well")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all well\n", done.stderr


def shape_of(op):
    if "[B, L, D]" in SHAPES[op]:
        return TOKENS
    return IMAGES if "C_skip" in SHAPES[op] else FEATURE if "spatial" in SHAPES[op] else GATES


def run(module, op, plan):
    """Outputs and gradients of one call."""
    example = example_arguments(op, shape_of(op), torch.float32, "cpu")
    with module.force_plan(plan):
        outputs = getattr(module, op)(*example.args, **example.kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [output for output in outputs if output.requires_grad]
        grads = torch.autograd.grad(wanted, example.tensors(), example_gradients(outputs), allow_unused=True)
    return [value for value in (*outputs, *grads) if value is not None]


@pytest.mark.parametrize("kind", ["eager", "kernel"])
@pytest.mark.parametrize("op", SHAPES)
def test_every_op_gives_what_ours_gives(package, op, kind):
    plan = "eager" if kind == "eager" else KERNELS.get(op, ops.list_plans(op)[0])
    expected = run(ops, op, plan)
    actual = run(package, op, plan)
    assert len(actual) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_ops_are_registered_under_a_name_of_their_own(package, variant):
    unique = json.loads((variant / "metadata.json").read_text())["id"]
    assert hasattr(getattr(torch.ops, unique), "scale_concat")
    assert getattr(torch.ops, unique).scale_concat is not torch.ops.scalelong_fast.scale_concat


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_no_state(package, name):
    layer = getattr(package.layers, name)
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    of_every_module = {member for member, _ in inspect.getmembers(nn.Module)}
    own = {member for member, _ in inspect.getmembers(layer)} - of_every_module
    assert own <= {"has_backward", "can_torch_compile"}
    assert list(inspect.signature(layer.forward).parameters) == ["self", "x", "skip"]


class Host(nn.Module):
    """A module of somebody's network, with what the layers' annotations ask for."""

    def __init__(self):
        super().__init__()
        self.kappa, self.num_groups, self.eps = 0.5, 4, 1e-5
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.down, self.up = nn.Linear(5, 2), nn.Linear(2, 5)

    def forward(self, x, skip):
        raise AssertionError("the layer's forward takes its place")


def expected_of(name, host, x, skip):
    if name == "LSScaleConcat":
        kappa = torch.sigmoid(host.up(torch.relu(host.down(skip.mean((2, 3))))))
        return torch.cat([x, kappa[:, :, None, None] * skip], 1)
    if name == "ScaleConcatLinear":
        return nn.functional.linear(torch.cat([x, 0.5 * skip], -1), host.weight, host.bias)
    concat = torch.cat([x, 0.5 * skip], 1)
    if name == "ScaleConcat":
        return concat
    return nn.functional.silu(nn.functional.group_norm(concat, 4, host.weight, host.bias))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_the_place_of_a_forward(package, name):
    torch.manual_seed(0)
    host = Host()
    shapes = [(2, 3, 4, 4), (2, 5, 4, 4)]
    if name == "ScaleConcatLinear":
        shapes = [(2, 6, 3), (2, 6, 5)]
        host.weight, host.bias = nn.Parameter(torch.randn(4, 8)), None
    x, skip = (torch.randn(shape, requires_grad=True) for shape in shapes)
    expected = expected_of(name, host, x, skip)
    host.forward = getattr(package.layers, name).forward.__get__(host)
    actual = host(x, skip)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    inputs = [x, skip, *(p for p in host.parameters() if p is not None)]
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, weights, allow_unused=True),
        torch.autograd.grad(expected, inputs, weights, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_the_layers_are_those_of_the_library_too():
    from scalelong_fast.integrations.hub_kernel import layers

    host, (x, skip) = Host(), (torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    assert torch.equal(layers.ScaleConcat.forward(host, x, skip), torch.cat([x, 0.5 * skip], 1))


def test_the_command_writes_it_anew_and_touches_nothing_else(tmp_path, capsys):
    out = tmp_path / "repository"
    assert main([str(out)]) == 0
    assert "scalelong-fast in" in capsys.readouterr().out
    (out / "build" / "torch-universal" / "scalelong_fast" / "stale.py").write_text("")
    assert main([str(out), "--version", "3"]) == 0
    assert not (out / "build" / "torch-universal" / "scalelong_fast" / "stale.py").exists()
    assert json.loads((out / "build" / "torch-universal" / "metadata.json").read_text())["version"] == 3
    (out / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert main([str(out)]) == 2
    assert "It also holds mine.txt." in capsys.readouterr().err
    assert (out / "mine.txt").read_text() == "mine"


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="version: got 0"):
        build_hub_kernel(tmp_path / "out", version=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="There is a file of that name"):
        build_hub_kernel(tmp_path / "file")
    (tmp_path / "out" / "build" / "torch210-cu128-x86_64-linux").mkdir(parents=True)
    with pytest.raises(UserError, match="It also holds other builds"):
        build_hub_kernel(tmp_path / "out")
