"""Autocast, the dtype of the residual stream, torch.compile and recording."""

import copy
import pickle

import pytest
import torch

from scalelong_fast.models import UViT
from scalelong_fast.scaling import list_scalings


def run_under_autocast(config, batch, dtype=torch.bfloat16):
    model = UViT(config)
    streams = []
    model.mid_block.register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    with torch.autocast("cpu", dtype=dtype):
        out = model(*batch)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return model, out.detach(), streams[0]


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
@pytest.mark.parametrize(("residual", "stream"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_residual_stream_under_bfloat16_autocast(tiny, batch_for, kind, residual, stream):
    config = tiny(kind, residual_dtype=residual)
    batch = batch_for(config)
    model, out, seen = run_under_autocast(config, batch)
    assert seen == stream
    assert out.dtype == torch.float32
    with torch.no_grad():
        exact = model(*batch)
    assert (out - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("scaling", list_scalings())
def test_every_scaling_runs_on_a_bfloat16_stream(tiny, batch_for, scaling):
    config = tiny(residual_dtype="bf16", scaling=scaling)
    assert run_under_autocast(config, batch_for(config))[1].isfinite().all()


def test_float16_autocast_never_narrows_the_stream(tiny, batch_for):
    config = tiny(residual_dtype="bf16")
    assert run_under_autocast(config, batch_for(config), torch.float16)[2] == torch.float32


def test_without_autocast_the_residual_dtype_changes_nothing(tiny, batch_for):
    narrow, wide = UViT(tiny(residual_dtype="bf16")), UViT(tiny())
    narrow.load_state_dict(wide.state_dict())
    batch = batch_for(wide.config)
    assert torch.equal(narrow(*batch), wide(*batch))


def test_output_has_the_dtype_of_the_input(tiny, batch_for):
    model = UViT(tiny())
    x, timesteps, _ = batch_for(model.config)
    assert model(x, timesteps).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x.bfloat16(), timesteps).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        assert copy.deepcopy(model).to(dtype)(x.to(dtype), timesteps).dtype == dtype


def compile_afresh(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("scaling", list_scalings())
def test_one_compiled_graph_equals_eager(tiny, batch_for, scaling):
    config = tiny(depth=2, scaling=scaling)
    model, (x, timesteps, _) = UViT(config), batch_for(config)
    with torch.no_grad():
        torch.testing.assert_close(compile_afresh(model)(x, timesteps), model(x, timesteps), rtol=1e-6, atol=1e-6)


def test_compiled_gradients_equal_eager_ones(tiny, batch_for):
    config = tiny("class", depth=2, scaling="ls")
    model, batch = UViT(config), batch_for(config)

    def gradients(network):
        model.zero_grad()
        network(*batch).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    torch.testing.assert_close(gradients(compile_afresh(model)), gradients(model), rtol=1e-5, atol=1e-7)


def test_a_compiled_model_records_when_asked_later(tiny, batch_for):
    config = tiny(depth=2, scaling="ls")
    model, (x, timesteps, _) = UViT(config), batch_for(config)
    compiled = compile_afresh(model)
    with torch.no_grad():
        plain = compiled(x, timesteps)
        with model.scaling.recording() as kappas:
            recorded = compiled(x, timesteps)
        with model.scaling.recording() as expected:
            model(x, timesteps)
    torch.testing.assert_close(recorded, plain)
    assert sorted(kappas) == [1]
    torch.testing.assert_close(kappas, expected)


@pytest.mark.parametrize("scaling", list_scalings())
def test_recording_a_forward_gives_every_kappa(tiny, batch_for, scaling):
    config = tiny("text", scaling=scaling)
    model, batch = UViT(config), batch_for(config)
    before = model(*batch)
    with model.scaling.recording() as kappas:
        during = model(*batch)
    assert torch.equal(before, during)
    assert sorted(kappas) == [1, 2]
    shape = (3, config.num_tokens) if scaling.startswith("ls") else ()
    assert all(kappa.shape == shape for kappa in kappas.values())


def test_models_copy_and_pickle(tiny, batch_for):
    config = tiny("class")
    model, batch = UViT(config), batch_for(config)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*batch), model(*batch))
        assert twin.pos_embed.data_ptr() != model.pos_embed.data_ptr()
