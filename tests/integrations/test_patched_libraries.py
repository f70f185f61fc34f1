"""Patched networks among other libraries: adapters, averages, pipelines, offloading, export."""

import copy
import warnings

import pytest
import torch
from torch import nn

from scalelong_fast import apply_scalelong, load_scalelong, remove_scalelong, save_scalelong
from scalelong_fast.errors import UserError
from scalelong_fast.integrations.patching.deferred import always_defer
from scalelong_fast.scaling import SEGate

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    ).eval()


def patched(scaling="ls", **options):
    model = apply_scalelong(unet(), scaling, **options)
    for gate in model.modules():
        if isinstance(gate, SEGate):
            nn.init.normal_(gate.up.weight)
            nn.init.normal_(gate.up.bias)
    return model


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    return sample, torch.tensor([1, 400]), torch.randn(2, 3, 16, generator=generator).to(dtype)


def output(model, dtype=torch.float32):
    with torch.no_grad():
        return model(*inputs(dtype)).sample


def gradients(model):
    model.zero_grad()
    model(*inputs()).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys()
    scale = max(grad.abs().max() for grad in theirs.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=float(tolerance * scale), msg=name)


@pytest.mark.parametrize("options", [{}, {"scaling": "cs"}], ids=["ls", "cs"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_deferred_network(options, checkpointing):
    """The fused plan in a whole network: same values, same gradients, and every skip went into a fused norm."""
    plain, fused = patched(fused=False, **options), patched(**options)
    for model in (plain, fused):
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
    with always_defer():
        assert_same_gradients(gradients(fused), gradients(plain))
        torch.testing.assert_close(output(fused), output(plain), rtol=1e-4, atol=1e-5)
    taken = {site.taken for site in fused.scalelong.sites}
    assert "scale_concat_group_norm, with the SiLU" in taken
    assert {site.taken for site in plain.scalelong.sites} == {None}


def test_freeu_reads_deferred_skips():
    plain, fused = patched(fused=False), patched()
    for model in (plain, fused):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with always_defer():
        torch.testing.assert_close(output(fused), output(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes(dtype):
    model = patched().to(dtype)
    expected = output(patched())
    assert {p.dtype for p in model.scalelong.parameters()} == {dtype}
    torch.testing.assert_close(output(model, dtype).float(), expected, rtol=0.1, atol=0.1)
    with always_defer():
        torch.testing.assert_close(output(model, dtype).float(), expected, rtol=0.1, atol=0.1)


def test_export():
    model = patched()
    with always_defer():
        exported = torch.export.export(model, inputs())
    torch.testing.assert_close(exported.module()(*inputs()).sample, output(model), rtol=1e-4, atol=1e-5)
    assert any("scalelong" in name for name in exported.state_dict)


def test_conversion_to_a_motion_network(tmp_path):
    """diffusers builds another network there, part by part, and leaves the patch out; the folder carries it over."""
    model = patched()
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    motion = diffusers.UNetMotionModel.from_unet2d(model, adapter)
    load_scalelong(motion, save_scalelong(model, tmp_path))
    ours, theirs = motion.scalelong.state_dict(), model.scalelong.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(motion.scalelong.sites) == len(model.scalelong.sites)


def test_config_of_another_class_says_that_gates_are_new():
    class Other(diffusers.UNet2DConditionModel):
        pass

    with pytest.warns(UserWarning, match=r"config of a UNet2DConditionModel.*load_state_dict"):
        assert len(Other.from_config(patched().config).scalelong.sites) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Other.from_config(patched("cs").config)


# PEFT


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False, **options)


def test_lora_on_a_patched_network(tmp_path):
    model = patched()
    before = output(model)
    model.add_adapter(lora())
    # PEFT freezes all but its own; whoever wants the gates trained beside it says so.
    assert not any(p.requires_grad for p in model.scalelong.parameters())
    model.scalelong.requires_grad_(True)
    trained = gradients(model)
    assert {name.split(".")[0] for name in trained} == {"down_blocks", "mid_block", "up_blocks", "scalelong"}
    assert sum("scalelong" in name for name in trained) == len(list(model.scalelong.parameters()))
    assert all("lora" in name or "scalelong" in name for name in trained)
    changed = output(model)
    assert not torch.allclose(changed, before)
    model.save_lora_adapter(tmp_path)
    other = patched()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(output(other), changed)
    other.unload_lora()
    torch.testing.assert_close(output(other), before)
    with always_defer():
        torch.testing.assert_close(output(model), changed, rtol=1e-4, atol=1e-5)


def test_patching_a_network_with_lora():
    model = unet()
    model.add_adapter(lora())
    expected = output(model)
    apply_scalelong(model, "cs", kappa=1.0)
    assert torch.equal(output(model), expected)
    assert apply_scalelong(remove_scalelong(model)).scalelong is not None
    assert all(p.requires_grad for p in model.scalelong.parameters())


def test_gates_saved_with_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(patched(), lora(modules_to_save=["scaling"]))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    before = output(wrapped)
    for _ in range(2):
        grads = gradients(wrapped)
        optimizer.step()
    gates = [name for name in grads if "scalelong" in name]
    assert len(gates) == len(list(patched().scalelong.parameters()))
    after = output(wrapped)
    assert not torch.allclose(after, before)
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(patched(), tmp_path)), after)


def test_copy_of_the_patch_alone_is_refused():
    """PEFT would train a copy that no hook asks."""
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"modules_to_save=\['scaling'\]"):
        peft.get_peft_model(patched(), lora(modules_to_save=["scalelong"]))


# Averages


def test_ema_model(tmp_path):
    from diffusers.training_utils import EMAModel

    model = patched()
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.step(model.parameters())
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(model))
    assert len(loaded.shadow_params) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(loaded.shadow_params, average.shadow_params, strict=True))
    other = patched()
    loaded.copy_to(other.parameters())
    averaged = type(model).from_pretrained(tmp_path)
    assert averaged.scalelong.settings == model.scalelong.settings
    torch.testing.assert_close(output(averaged), output(other))


def test_averaged_copy_has_gates_of_its_own():
    model = patched()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    first = output(average.module)
    nn.init.zeros_(model.scalelong.scaling.gates[0].up.bias)
    assert torch.equal(output(average.module), first)
    average.update_parameters(model)
    average.update_parameters(model)
    assert not torch.equal(output(average.module), first)
    other = copy.deepcopy(model)
    assert other.scalelong is not model.scalelong
    assert torch.equal(output(other), output(model))


# Pipelines


def pipeline(network):
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(vocabulary),
        max_position_embeddings=8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4),
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=network,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, height=8, width=8, output_type="latent", generator=generator).images


@pytest.fixture(scope="module")
def pipe():
    return pipeline(patched())


def test_pipeline_round_trip(pipe, tmp_path):
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    ours, theirs = pipe.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(sample(loaded), expected)
    half = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, safety_checker=None)
    assert {p.dtype for p in half.unet.scalelong.parameters()} == {torch.bfloat16}
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(loaded)
    assert other.unet is loaded.unet


def test_pipeline_options(pipe):
    expected = sample(pipe)
    with always_defer():
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.enable_attention_slicing()
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.disable_attention_slicing()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.allclose(sample(pipe), expected, rtol=1e-2, atol=1e-2)
    pipe.disable_freeu()
    torch.testing.assert_close(sample(pipe), expected)


def test_lora_in_a_pipeline(pipe, tmp_path):
    peft = pytest.importorskip("peft")
    trained = patched()
    trained.add_adapter(lora())
    layers = peft.get_peft_model_state_dict(trained)
    assert all("lora" in name for name in layers)
    expected = sample(pipe)
    type(pipe).save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe.load_lora_weights(tmp_path)
    changed = sample(pipe)
    assert not torch.allclose(changed, expected)
    pipe.fuse_lora()
    torch.testing.assert_close(sample(pipe), changed, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["cpu_offload", "dispatch", "group_offload", "layerwise"])
def test_offloading_hooks(way):
    accelerate = pytest.importorskip("accelerate")
    model = patched()
    expected = output(model)
    cpu = torch.device("cpu")
    if way == "cpu_offload":  # what enable_model_cpu_offload does, and on to every layer
        accelerate.cpu_offload(model, execution_device=cpu, state_dict=model.state_dict())
    elif way == "dispatch":
        accelerate.dispatch_model(model, {name: "cpu" for name, _ in model.named_children()}, force_hooks=True)
    elif way == "group_offload":
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        torch.testing.assert_close(output(model), expected, rtol=0.1, atol=0.1)
        assert "_skip_layerwise_casting_patterns" not in remove_scalelong(model).__dict__
        return
    torch.testing.assert_close(output(model), expected)
    with always_defer():
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
