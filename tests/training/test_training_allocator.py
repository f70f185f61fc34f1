"""Memory freed on a CPU stays with the process while it trains, and only then."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from scalelong_fast.training import allocator
from scalelong_fast.training.allocator import keep_freed_memory
from scalelong_fast.training.step import TrainStep

CPU = torch.device("cpu")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

PAGES = """
import resource, torch
from scalelong_fast.training.allocator import keep_freed_memory

def faults(size=96 << 20, times=6):
    for _ in range(3):
        torch.zeros(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with keep_freed_memory(torch.device("cpu")) as kept:
    inside = faults()
print(kept, before, inside, faults(128 << 20))  # more than was kept
"""


def pages(**environment):
    """Whether memory is kept, and page faults before, inside and after."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = subprocess.run(
        [sys.executable, "-c", PAGES], env=own | environment, check=True, capture_output=True, text=True
    )
    kept, *faults = out.stdout.split()
    return kept == "True", *map(int, faults)


@glibc
def test_no_page_is_asked_for_twice_inside():
    kept, before, inside, after = pages()
    assert kept
    assert before > 6 * 40  # six times 96 MiB, were they huge pages
    assert after > 6 * 40
    assert inside < before / 4  # once, if something small has come to lie where the block was


@glibc
@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=10"}],
    ids=["MALLOC_", "GLIBC_TUNABLES"],
)
def test_what_the_user_has_set_up_stays(environment):
    assert not pages(**environment)[0]


def test_another_device_and_another_system_are_left_alone(monkeypatch):
    with keep_freed_memory(torch.device("meta")) as kept:
        assert not kept
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    with keep_freed_memory(CPU) as kept:
        assert not kept


class TestSettings:
    @pytest.fixture
    def settings(self, monkeypatch):
        """The allocator's settings as they are changed."""
        settings = {}

        class Libc:
            def mallopt(self, parameter, value):
                settings[parameter] = value

        monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.36"))
        monkeypatch.setattr(allocator, "_is_set_by_hand", lambda: False)
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: Libc())
        return settings

    def test_they_are_the_usual_ones_again_whatever_happens_inside(self, settings):
        with pytest.raises(KeyboardInterrupt), keep_freed_memory(CPU):
            assert settings == {-4: 0, -1: (1 << 31) - 1}
            raise KeyboardInterrupt
        assert settings == allocator._USUAL

    def test_a_training_has_them(self, settings, train, tiny, tmp_path, monkeypatch):
        during = []
        take = TrainStep.__call__
        monkeypatch.setattr(TrainStep, "__call__", lambda *args: during.append(dict(settings)) or take(*args))
        train(tiny({"train.steps": 2}), tmp_path / "run")
        assert during == [{-4: 0, -1: (1 << 31) - 1}] * 2
        assert settings == allocator._USUAL
