"""Device, precision and compilation, resolved from ``auto``."""

import contextlib

import pytest
import torch

import scalelong_fast.training.hardware as hardware
from scalelong_fast.errors import UserError
from scalelong_fast.training import TrainConfig, get_preset, list_presets
from scalelong_fast.training.hardware import resolve_execution


def resolve(**settings):
    return resolve_execution(TrainConfig(**{"device": "cpu", "compile": "off", **settings}))


class TestDevice:
    def test_auto_is_a_gpu_where_there_is_one(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert resolve(device="auto").device.type == "cpu"

    @pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda:x", "", "mps", "meta"])
    def test_a_device_that_is_not_there_is_refused_by_name(self, name, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(UserError, match=rf"^train\.device: got '{name}'"):
            resolve(device=name)

    def test_cuda_without_a_gpu_is_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        with pytest.raises(UserError, match=r"^train\.device: got 'cuda', but 0 CUDA devices are visible"):
            resolve(device="cuda")


class TestPrecision:
    @pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
    def test_an_explicit_precision_is_taken(self, precision, dtype):
        assert resolve(precision=precision).autocast is dtype

    @pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, None)])
    def test_auto_on_a_cpu_is_bf16_only_where_it_is_native(self, monkeypatch, native, dtype):
        monkeypatch.setattr(hardware, "cpu_has_native_bf16", lambda: native)
        assert resolve(precision="auto").autocast is dtype

    @pytest.mark.parametrize("native", [True, False])
    def test_auto_gpu_is_fp32_on_any_cpu_and_auto_on_a_gpu(self, monkeypatch, native):
        monkeypatch.setattr(hardware, "cpu_has_native_bf16", lambda: native)
        assert resolve(precision="auto-gpu").autocast is None
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        gpu = torch.device("cuda")
        wanted = torch.bfloat16 if native else torch.float16
        assert hardware.autocast_dtype("auto-gpu", gpu) is hardware.autocast_dtype("auto", gpu) is wanted

    @pytest.mark.parametrize("preset", list_presets())
    def test_no_preset_gives_up_narrow_products_on_a_gpu(self, monkeypatch, preset):
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        precision = get_preset(preset).train.precision
        assert hardware.autocast_dtype(precision, torch.device("cuda")) is torch.bfloat16

    def test_fp16_needs_a_gpu(self):
        with pytest.raises(UserError, match=r"train\.precision: got 'fp16', expected bf16 or fp32 on a CPU"):
            resolve(precision="fp16")


class TestCompile:
    @pytest.fixture(autouse=True)
    def _compiler(self, monkeypatch):
        monkeypatch.setattr(hardware, "find_cxx_compiler", lambda: "/usr/bin/g++")

    @pytest.mark.parametrize(
        ("setting", "steps", "compiled"),
        [("auto", 499, False), ("auto", 10**5, True), ("on", 1, True), ("off", 10**5, False)],
    )
    def test_auto_compiles_runs_that_repay_it(self, setting, steps, compiled):
        execution = resolve(compile=setting, steps=steps)
        assert execution.compiled is compiled
        assert execution.notes == ()

    @pytest.mark.parametrize("setting", ["auto", "on"])
    def test_without_a_compiler_one_note_says_so(self, monkeypatch, setting):
        monkeypatch.setattr(hardware, "find_cxx_compiler", lambda: None)
        execution = resolve(compile=setting, steps=10**5)
        assert execution.compiled is False
        (note,) = execution.notes
        assert note.startswith("No C++ compiler found")

    def test_no_note_where_nothing_would_be_compiled(self, monkeypatch):
        monkeypatch.setattr(hardware, "find_cxx_compiler", lambda: None)
        assert resolve(compile="off").notes == ()
        assert resolve(compile="auto", steps=10).notes == ()


def test_the_other_way_to_set_tf32_is_pointed_out(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with (
            pytest.raises(UserError, match=r"^train\.tf32: this process has set fp32_precision"),
            hardware.fp32_products(torch.device("cuda"), True),
        ):
            pass
    finally:
        matmul.fp32_precision = before


def test_a_compiler_is_looked_for_on_the_path(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("PATH", str(tmp_path))
    with config.patch({"cpp.cxx": (None, "g++")}):
        assert hardware.find_cxx_compiler() is None
        compiler = tmp_path / "g++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        assert hardware.find_cxx_compiler() == str(compiler)


def test_describes_itself_in_a_line():
    assert resolve(precision="bf16").describe() == "cpu, bf16, eager"
    assert resolve(precision="fp32").describe() == "cpu, fp32, eager"
