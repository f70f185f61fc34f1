"""Named runs: what ``scalelong-fast train PRESET`` starts from."""

from scalelong_fast.errors import unknown_name
from scalelong_fast.models import model_config
from scalelong_fast.training.config import DataConfig, DiffusionConfig, RunConfig, SampleConfig, TrainConfig

#: Runs by name, each with a line that describes it.
PRESETS: dict[str, tuple[str, RunConfig]] = {
    "digits-uvit": (
        "class-conditional U-ViT with LS on 8x8 handwritten digits; minutes on a laptop",
        RunConfig(
            model=model_config("uvit_digits"),
            data=DataConfig(name="digits"),
            diffusion=DiffusionConfig(label_dropout=0.1),
            train=TrainConfig(
                steps=3000,
                batch_size=64,
                lr=3e-3,
                betas=(0.9, 0.99),
                weight_decay=0.03,
                warmup_steps=100,
                decay_steps=3000,
                ema_decay=0.995,
                log_every=100,
                save_every=1000,
                # Compiling takes 20 to 70 s on two cores and would save 10 ms a step: it just about breaks even.
                compile="off",
            ),
            sample=SampleConfig(sampler="dpm-solver++", guidance=2.0),
        ),
    ),
    "digits-unet": (
        "class-conditional UNet with LS on 8x8 handwritten digits; minutes on a laptop",
        RunConfig(
            model=model_config("unet_digits"),
            data=DataConfig(name="digits"),
            diffusion=DiffusionConfig(label_dropout=0.1),
            train=TrainConfig(
                steps=1200,
                batch_size=64,
                lr=1e-3,
                betas=(0.9, 0.99),
                weight_decay=0.03,
                warmup_steps=100,
                decay_steps=1200,
                ema_decay=0.995,
                log_every=50,
                save_every=400,
                # On a CPU the convolutions gain by bf16 what PyTorch's GroupNorm of channels_last images loses by it.
                precision="fp32",
                # Compiling takes longer than it saves in so few steps.
                compile="off",
            ),
            sample=SampleConfig(sampler="dpm-solver++", guidance=2.0),
        ),
    ),
    "cifar10-uvit": (
        "U-ViT-S/2 with LS on CIFAR-10, the paper's settings (500k steps of batch 128)",
        RunConfig(
            model=model_config("uvit_s2"),
            data=DataConfig(name="cifar10", flip=True),
            train=TrainConfig(
                steps=500_000, batch_size=128, lr=2e-4, betas=(0.99, 0.999), warmup_steps=2500, save_every=10_000
            ),
            sample=SampleConfig(sampler="dpm-solver++"),
        ),
    ),
    "cifar10-unet": (
        "DDPM's UNet with LS on CIFAR-10, its settings and the paper's 500k steps; CS: --model.kappa 0.5 to 0.7",
        RunConfig(
            model=model_config("unet_cifar10"),
            data=DataConfig(name="cifar10", flip=True),
            diffusion=DiffusionConfig(schedule="ddpm"),
            # Batch size, learning rate, EMA, flips and dropout (in the model) are those of Ho et al. 2020, App. B, who
            # took Adam, that is no weight decay, and 800k steps; warm-up and clipping those of their released code.
            train=TrainConfig(
                steps=500_000,
                batch_size=128,
                lr=2e-4,
                weight_decay=0.0,
                warmup_steps=5000,
                ema_decay=0.9999,
                grad_clip=1.0,
                save_every=10_000,
            ),
            sample=SampleConfig(sampler="dpm-solver++"),
        ),
    ),
}


def list_presets() -> list[str]:
    """Names of the presets."""
    return list(PRESETS)


def get_preset(name: str) -> RunConfig:
    """The run called ``name``; an unknown name raises with the nearest ones."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name][1]
