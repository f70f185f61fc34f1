"""The step on a GPU: it never waits, and CUDA graphs compute what eager operators do."""

import pytest
import torch

from scalelong_fast.diffusion import create_schedule
from scalelong_fast.models import build_model
from scalelong_fast.training.batches import BatchSource, Draw
from scalelong_fast.training.hardware import Execution, fp32_products
from scalelong_fast.training.instruments import Instruments
from scalelong_fast.training.metrics import LossWindow
from scalelong_fast.training.step import TrainStep
from scalelong_fast.training.warmup import warm_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _compiled_afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step_on_gpu(config, mode, autocast=None):
    """A TrainStep from the same weights every time, none of which is zero: behind zeros there are no gradients."""
    torch.manual_seed(0)
    model = build_model(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.03)
    schedule = create_schedule(config.diffusion.schedule).to(GPU)
    return TrainStep(model.to(GPU), schedule, config, Execution(GPU, autocast, mode))


@pytest.mark.parametrize("mode", ["off", "block", "whole", "graphs"])
@pytest.mark.parametrize(
    ("preset", "autocast", "overrides"),
    [
        ("digits-uvit", torch.bfloat16, {"train.grad_clip": 1.0, "train.ema_profiles": (0.1,)}),
        ("digits-uvit", torch.float16, {"train.grad_clip": 1.0}),
        ("digits-unet", torch.bfloat16, {"model.dropout": 0.1}),
    ],
    ids=["bf16", "fp16", "dropout"],
)
def test_nothing_waits_for_the_gpu_from_the_draw_to_the_loss(tiny, toy_images, mode, preset, autocast, overrides):
    config = tiny({"train.device": "cuda", "data.flip": True, **overrides}, preset)
    train_step, window = step_on_gpu(config, mode, autocast), LossWindow(GPU)
    batches = BatchSource(toy_images, config, GPU)
    warm_up(train_step, batches(0), steps=3)
    window.add(0, train_step(0, batches(0)))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            window.add(step, train_step(step, batches(step)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.first_bad_step() is None
    assert window.mean() > 0


def losses_and_gradients(train_step, reference, draws):
    """Of the steps of ``train_step``, which before each gets the weights of ``reference``, which then moves on."""
    losses, gradients = [], []
    handle = train_step.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([parameter.grad.clone() for parameter in train_step.parameters])
    )
    for step, draw in enumerate(draws):
        with torch.no_grad():
            torch._foreach_copy_(train_step.parameters, reference.parameters)
        losses.append(train_step(step, draw))
        if train_step is not reference:
            reference(step, draw)
    handle.remove()
    return losses, gradients


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["digits-uvit", "digits-unet"])
def test_cuda_graphs_give_the_eager_losses_and_gradients(tiny, toy_images, preset, autocast):
    # Five steps: one runs, one is recorded, three are replayed, each on other weights and another batch.
    config = tiny({"train.device": "cuda"}, preset)
    batches = BatchSource(toy_images, config, GPU)
    draws = [batches(step) for step in range(5)]
    with fp32_products(GPU, tf32=False):
        eager = step_on_gpu(config, "off", autocast)
        expected, expected_gradients = losses_and_gradients(eager, eager, draws)
        graphs = step_on_gpu(config, "graphs", autocast)
        # The losses are kept until the end, when later replays have long overwritten the graphs' memory.
        losses, gradients = losses_and_gradients(graphs, step_on_gpu(config, "off", autocast), draws)
    share = 1e-4 if autocast is None else 3e-2
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=share, atol=0)
    assert len({float(loss) for loss in losses}) == len(losses)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        for g, w in zip(got, wanted, strict=True):
            assert (g - w).norm() <= share * 10 * w.norm() + 1e-6


def test_dropout_in_cuda_graphs_is_a_function_of_the_step(tiny, toy_images):
    config = tiny({"train.device": "cuda", "model.dropout": 0.5}, "digits-unet")
    draw = BatchSource(toy_images, config, GPU)(0)
    train_step = step_on_gpu(config, "graphs")
    warm_up(train_step, draw, steps=3)
    weights = [parameter.detach().clone() for parameter in train_step.parameters]

    def loss_of(step):
        with torch.no_grad():
            torch._foreach_copy_(train_step.parameters, weights)
        return float(train_step(step, draw))

    first, second = loss_of(1), loss_of(2)
    assert first != second
    assert [loss_of(1), loss_of(2)] == [first, second]


def test_the_memory_of_cuda_graphs_is_reported(tiny, tmp_path):
    config = tiny({"train.device": "cuda", "model.embed_dim": 64, "train.batch_size": 4096})
    shape = (config.train.batch_size, config.model.in_chans, config.model.img_size, config.model.img_size)
    labels = torch.zeros(shape[0], dtype=torch.int64, device=GPU)
    draw = Draw(
        torch.randn(shape, device=GPU), labels, torch.randn(shape, device=GPU), torch.rand(shape[0], device=GPU)
    )
    peaks = {}
    for mode in ("whole", "graphs"):
        train_step = step_on_gpu(config, mode, torch.bfloat16)
        with Instruments(config, train_step.execution, train_step.breakdown, tmp_path, 1, print) as instruments:
            warm_up(train_step, draw)
            instruments.start(0)
            for step in range(3):
                train_step(step, draw)
            torch.cuda.synchronize()
            peaks[mode] = instruments.measure(3)["memory"]
        del train_step, instruments
        torch.compiler.reset()
    assert peaks["graphs"] > 0.9 * peaks["whole"]
