"""What is compiled, how often, and that it computes the same."""

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from scalelong_fast.errors import UserError
from scalelong_fast.models import UNet, UNetConfig, UViT, UViTConfig, create_model, list_models
from scalelong_fast.ops import force_plan
from scalelong_fast.training import TrainConfig
from scalelong_fast.training.batches import BatchSource
from scalelong_fast.training.blocks import repeated_blocks
from scalelong_fast.training.compiling import (
    BLOCKWISE_PARAMETERS,
    KINDS_OF_BLOCK,
    choose_mode,
    compile_objective,
    make_eager,
)
from scalelong_fast.training.hardware import Execution, resolve_execution

CPU = torch.device("cpu")
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_heads": 2, "num_classes": -1}


@pytest.fixture
def graphs(monkeypatch):
    """Compile without generating code; the list takes the graphs, each as the ops in it."""
    seen = []

    def backend(module, inputs):
        seen.append([str(node.target) for node in module.graph.nodes])
        return module

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield seen
    torch._dynamo.reset()


class Network(nn.Module):
    """An objective that is nothing but its network's output, summed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x, t).square().sum()


def blockwise(model):
    return compile_objective(Network(model), "block")


class TestRepeatedBlocks:
    def test_of_a_uvit_in_the_order_they_run(self):
        model = UViT(UViTConfig(**SMALL, depth=4))
        assert repeated_blocks(model) == [*model.in_blocks, model.mid_block, *model.out_blocks]

    @pytest.mark.parametrize("kind", ["uvit", "unet"])
    def test_hold_nearly_all_parameters(self, kind):
        with torch.device("meta"):
            model = UViT(UViTConfig(embed_dim=512, depth=12)) if kind == "uvit" else UNet(UNetConfig())
        inside = sum(p.numel() for block in repeated_blocks(model) for p in block.parameters())
        assert inside > 0.9 * sum(p.numel() for p in model.parameters())
        assert len({id(block) for block in repeated_blocks(model)}) == len(repeated_blocks(model))

    def test_another_module_has_none(self):
        assert repeated_blocks(nn.Linear(2, 2)) == []


class TestOneByOne:
    #: Encoder and middle, decoder; fused: the first block, which has no addition to make, besides, and under CS the
    #: outermost skip, whose κ is 1.
    @pytest.mark.parametrize(
        ("fused", "scaling", "kinds"),
        [
            (False, "ls", 2),
            (False, "cs", 2),
            (True, "ls", 3),
            (True, "ls-individual", 3),
            (True, "cs", 4),
        ],
    )
    def test_equal_blocks_share_one_compilation(self, graphs, fused, scaling, kinds):
        model = UViT(UViTConfig(**SMALL, depth=20, fused=fused, scaling=scaling))
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
        expected = model(x, t)
        with torch._dynamo.config.patch(recompile_limit=1):  # PyTorch's own may be too few: it is raised
            torch.testing.assert_close(blockwise(model)(x, t), expected.square().sum())
        assert len(graphs) == counters["stats"]["unique_graphs"] == kinds
        assert not counters["graph_break"]

    def test_more_kinds_fit_than_the_networks_have(self):
        with torch.device("meta"):
            stages = [repeated_blocks(create_model(name)) for name in list_models()]
        assert max(map(len, stages)) < KINDS_OF_BLOCK

    def test_a_stage_that_is_one_layer_is_left_alone(self, graphs):
        sizes = {"model_channels": 4, "num_groups": 2, "num_heads": 1, "channel_mult": (1, 2), "num_res_blocks": 1}
        model = UNet(UNetConfig(img_size=8, in_chans=1, attention_resolutions=(), scaling="cs", fused=False, **sizes))
        x, t = torch.randn(2, *model.input_shape), torch.tensor([3.0, 700.0])
        expected = model(x, t).square().sum()
        torch.testing.assert_close(blockwise(model)(x, t), expected)
        convolutions = [block for block in repeated_blocks(model) if len(list(block.parameters())) == 2]
        assert len(convolutions) == 2  # of the image, and to the second level
        assert all(block._compiled_call_impl is None for block in convolutions)
        assert all(len(graph) > 10 for graph in graphs)

    def test_the_fused_ops_are_in_the_graphs(self, graphs):
        model = UViT(UViTConfig(**SMALL, depth=4, fused=True, scaling="ls"))
        with torch.no_grad(), force_plan("triton"), force_plan("pointer"):
            blockwise(model)(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]))
        decoder = [ops for ops in graphs if any("ls_skip_linear" in op for op in ops)]
        assert len(decoder) == 1
        assert not any("cat" in op for op in decoder[0])
        assert all(any("layer_norm_gap" in op for op in ops) for ops in graphs)

    def test_a_hook_on_a_layer_of_a_compiled_block_still_sees_it(self, graphs):
        model = UViT(UViTConfig(**SMALL, depth=2, fused=True))
        objective = blockwise(model)
        seen = []
        model.out_blocks[0].skip_linear.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape))
        objective(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]))
        assert [shape[-1] for shape in seen] == [2 * SMALL["embed_dim"]]

    def test_coefficients_are_recorded(self, graphs):
        model = UViT(UViTConfig(**SMALL, depth=6, fused=True, scaling="ls-individual"))
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
        with model.scaling.recording() as expected:
            model(x, t)
        objective = blockwise(model)
        with model.scaling.recording() as kappas:
            objective(x, t)
        assert sorted(kappas) == [1, 2, 3]
        torch.testing.assert_close(kappas, expected)

    def test_can_be_undone(self, graphs):
        model = UViT(UViTConfig(**SMALL, depth=2))
        objective = blockwise(model)
        make_eager(model)
        objective(torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]))
        assert not graphs

    def test_names_of_parameters_stay(self):
        model = UViT(UViTConfig(**SMALL, depth=2))
        before = list(model.state_dict())
        blockwise(model)
        assert list(model.state_dict()) == before


def test_the_whole_is_one_graph_forward_and_loss(graphs, tiny, make_step, toy_images):
    config = tiny()
    train_step = make_step(config, Execution(CPU, None, "whole"))
    train_step(0, BatchSource(toy_images, config, CPU)(0))
    assert len(graphs) == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("preset", ["digits-uvit", "digits-unet"])
def test_a_step_of_compiled_blocks_gives_the_eager_losses(graphs, preset, tiny, make_step, toy_images):
    config = tiny(preset=preset)
    batches = BatchSource(toy_images, config, CPU)
    eager, compiled = make_step(config), make_step(config, Execution(CPU, None, "block"))
    for step in range(3):
        torch.testing.assert_close(compiled(step, batches(step)), eager(step, batches(step)), rtol=1e-5, atol=1e-6)
    assert graphs
    assert compiled.execution.mode == "block"
    assert "block by block" in compiled.execution.describe()


def test_goes_on_eagerly_where_a_block_does_not_compile(monkeypatch, tiny, make_step, toy_images):
    def broken(module, inputs):
        raise RuntimeError("no Python.h")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    config = tiny()
    batches = BatchSource(toy_images, config, CPU)
    eager, compiled = make_step(config), make_step(config, Execution(CPU, None, "block"))
    with pytest.warns(UserWarning, match="torch.compile failed, going on eagerly"):
        assert compiled(0, batches(0)) == eager(0, batches(0))
    assert compiled(1, batches(1)) == eager(1, batches(1))


class TestChoice:
    class Big(UViT):
        def parameters(self, recurse=True):
            yield torch.empty(BLOCKWISE_PARAMETERS, device="meta")

    @pytest.fixture
    def model(self):
        return UViT(UViTConfig(**SMALL, depth=2))

    @pytest.mark.parametrize(
        ("setting", "mode"), [("auto", "whole"), ("on", "whole"), ("whole", "whole"), ("block", "block")]
    )
    def test_of_a_small_model(self, model, setting, mode):
        assert choose_mode(setting, model) == mode

    def test_big_models_start_block_by_block(self):
        big = self.Big(UViTConfig(**SMALL, depth=2))
        assert choose_mode("auto", big) == "block"
        assert choose_mode("whole", big) == "whole"

    def test_sharded_models_are_compiled_block_by_block(self, model):
        assert choose_mode("auto", model, sharded=True) == "block"
        assert choose_mode("auto", model, several=True) == "block"
        assert choose_mode("whole", model, several=True) == "whole"
        for mode in ("whole", "graphs", "on"):
            with pytest.raises(UserError, match=r"train.compile: got .* sharded\. Set --train.compile block"):
                choose_mode(mode, model, sharded=True)

    def test_a_network_without_blocks(self):
        assert choose_mode("auto", nn.Linear(2, 2)) == "whole"
        with pytest.raises(UserError, match=r"train\.compile: got 'block', expected whole or off"):
            choose_mode("block", nn.Linear(2, 2))

    def test_cuda_graphs_need_a_gpu(self):
        with pytest.raises(UserError, match=r"train\.compile: got 'graphs', expected .* CUDA graphs need a GPU"):
            resolve_execution(TrainConfig(compile="graphs", device="cpu"))

    def test_cuda_graphs_take_the_batch_in_one_part(self):
        with pytest.raises(UserError, match=r"train\.compile: got 'graphs', expected .* train.accumulate"):
            TrainConfig(compile="graphs", accumulate=2)
