"""Attention kernels are believed when they have been seen to be right; products in float32 follow the policy."""

import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend

from scalelong_fast.models import UNet, UNetConfig, UViT, UViTConfig, attention, unet_attention
from scalelong_fast.models.attention import attend_jointly
from scalelong_fast.training.attention_backend import attention_shapes, first_sound, is_sound, sound_attention
from scalelong_fast.training.hardware import Execution, fp32_products

CPU = torch.device("cpu")
SHAPES = [(10, 2, 8), (17, 3, 16)]
MATH, FLASH, CUDNN = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


class TestFirstSound:
    def test_the_first_that_passes_is_taken_and_no_other_tried(self):
        tried = []
        assert first_sound([CUDNN, FLASH, MATH], lambda backend: tried.append(backend) or backend == FLASH) == FLASH
        assert tried == [CUDNN, FLASH]

    def test_explicit_products_where_none_passes(self):
        assert first_sound([CUDNN, FLASH], lambda backend: False) == MATH


class TestIsSound:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("backend", [MATH, FLASH])
    def test_kernels_that_compute_what_they_should(self, backend, dtype):
        def attend(qkv, scale, name):  # past this package's own products for bf16 on a CPU
            return attention.attend(*qkv.unbind(2), scale, name)

        assert is_sound(backend, SHAPES, dtype, CPU, attend)

    def test_one_that_is_not_for_this_machine(self):
        assert not is_sound(CUDNN, SHAPES, torch.float32, CPU)

    @pytest.mark.parametrize("where", ["forward", "backward"])
    @pytest.mark.parametrize("fault", [float("nan"), float("inf"), 0.1])
    def test_wrong_numbers_are_seen(self, where, fault):
        class Faulty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.index_fill(0, torch.tensor(1), fault) if where == "forward" else x.clone()

            @staticmethod
            def backward(ctx, grad):
                return grad.index_fill(0, torch.tensor(1), fault) if where == "backward" else grad

        def attend(qkv, scale, name):
            out = attend_jointly(qkv, scale, name)
            return Faulty.apply(out) if name == "sdpa" and qkv.shape[1] == SHAPES[1][0] else out

        assert is_sound(MATH, SHAPES, torch.float32, CPU)
        assert not is_sound(MATH, SHAPES, torch.float32, CPU, attend)


class TestShapes:
    @pytest.mark.parametrize(
        "config",
        [
            UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=4, num_classes=10),
            UNetConfig(
                img_size=16,
                in_chans=1,
                model_channels=8,
                channel_mult=(1, 2, 4),
                num_res_blocks=1,
                attention_resolutions=(16, 8),
                num_heads=2,
                num_groups=4,
            ),
        ],
        ids=["uvit", "unet"],
    )
    def test_are_those_that_the_network_attends_with(self, monkeypatch, config):
        seen = {}

        def record(qkv, scale, backend):
            seen[tuple(qkv.shape[i] for i in (1, 3, 4))] = None
            return attend_jointly(qkv, scale, backend)

        for module in (attention, unet_attention):
            monkeypatch.setattr(module, "attend_jointly", record)
        model = UViT(config) if isinstance(config, UViTConfig) else UNet(config)
        y = torch.zeros(2, dtype=torch.int64) if config.num_classes > 0 else None
        with torch.no_grad():
            model(torch.randn(2, *model.input_shape), torch.zeros(2), y)
        assert attention_shapes(config) == list(seen)


def test_a_cpu_keeps_its_attention():
    with sound_attention(UViTConfig(), Execution(CPU, None)) as note:
        assert note is None


class TestFp32Products:
    @pytest.fixture(autouse=True)
    def _as_before(self):
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        yield
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]

    @pytest.mark.parametrize("tf32", [True, False])
    def test_of_a_gpu_follow_the_setting_and_are_then_as_before(self, tf32):
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(KeyError), fp32_products(torch.device("cuda"), tf32):
                assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
                assert torch.backends.cuda.matmul.allow_tf32 is tf32
                assert torch.backends.cudnn.allow_tf32 is tf32
                raise KeyError
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

    def test_of_a_cpu_are_left_alone(self):
        torch.set_float32_matmul_precision("medium")
        with fp32_products(CPU, True):
            assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.gpu
def test_on_a_gpu_a_kernel_is_picked():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    config = UViTConfig(img_size=32, patch_size=2, embed_dim=512, num_heads=8)
    with sound_attention(config, Execution(torch.device("cuda", 0), torch.bfloat16)) as note:
        assert note.startswith("Attention: ")
        assert "explicit" not in note
