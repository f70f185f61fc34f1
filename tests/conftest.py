"""Fixtures of all tests."""

import gc
import importlib.machinery
import os
import random
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch


def _patch_the_language_once_a_launch():
    """Spare Triton's interpreter a third of its time, which goes into preparing triton.language.

    It is prepared at a launch and put back afterwards, and prepared in the same way again at each call of a function
    by a kernel, where nothing puts it back before the launch's end.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope") or not hasattr(interpreter, "_patch_lang"):
        return  # another version, which may do otherwise
    patch, prepared = interpreter._patch_lang, set()

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            prepared.clear()
            super().restore()

    def patch_once(fn):
        modules = (interpreter.tl, interpreter.tl.core)
        seen = frozenset(id(value) for value in fn.__globals__.values() if any(value is m for m in modules))
        scope = Scope()
        if seen not in prepared:
            prepared.add(seen)
            scope._changes = patch(fn)._changes
        return scope

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    # Before anything imports Triton: its interpreter runs the kernels on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    _patch_the_language_once_a_launch()
# No folder: plans that somebody tuned on this computer are none of the tests' business.
os.environ["SCALELONG_CACHE"] = os.devnull

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError:
    # Bare GPU machines lack it. Only the tests that need it are skipped there, not the files they stand in.
    def _given(*args, **kwargs):
        def decorate(test):
            def skipped():
                pytest.skip("needs hypothesis")

            skipped.__name__ = test.__name__
            return skipped

        return decorate

    def _unchanged(*args, **kwargs):
        return lambda test: test

    sys.modules["hypothesis"] = types.ModuleType("hypothesis")
    sys.modules["hypothesis"].__spec__ = importlib.machinery.ModuleSpec("hypothesis", None)  # torch asks for it
    sys.modules["hypothesis"].__dict__.update(
        given=_given, settings=_unchanged, example=_unchanged, assume=mock.MagicMock(), HealthCheck=mock.MagicMock()
    )
    sys.modules["hypothesis.strategies"] = sys.modules["hypothesis"].strategies = mock.MagicMock()


def _seed_all() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report():
    """What a file draws while it is imported is the same in every run, whichever files run."""
    _seed_all()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same for fixtures of a whole file, whichever of its tests asks first."""
    _seed_all()


@pytest.fixture(autouse=True)
def _seed():
    """The same for the test itself, whether or not such fixtures drew before it: what failed once fails again."""
    _seed_all()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models of this size lose by a second thread, and badly so on a busy computer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """What is there when a file's tests begin stays: collections, of which a training makes two, pass it by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where Triton kernels run: the CPU through the interpreter, and a GPU where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def assert_as_accurate():
    """Check a result against float64, with the error of PyTorch's own path of the same dtype as the yardstick.

    ``assert_as_accurate(actual, pytorch, exact, factor=2.0)``: the root-mean-square error of ``actual`` is at most
    ``factor`` times that of ``pytorch``, or, where PyTorch happens to be exact, half a unit in the last place.
    """

    def rms(x: torch.Tensor) -> float:
        return x.double().square().mean().sqrt().item() if x.numel() else 0.0

    def check(actual, pytorch, exact, factor: float = 2.0) -> None:
        assert actual.shape == exact.shape
        assert actual.dtype == pytorch.dtype
        exact = exact.double()
        yardstick = max(rms(pytorch.double() - exact), torch.finfo(actual.dtype).eps / 2 * rms(exact))
        error = rms(actual.double() - exact)
        assert error <= factor * yardstick, f"error {error:.3g}, {error / max(yardstick, 1e-300):.2f} times PyTorch's"

    return check


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from torch.empty and torch.empty_like holds NaN: what a kernel forgets to write shows."""

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
