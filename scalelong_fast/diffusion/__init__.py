"""Forward processes, the denoising loss and the samplers; knows nothing of models or training."""

from scalelong_fast.diffusion.loss import diffusion_loss, stratified_uniform
from scalelong_fast.diffusion.samplers import default_steps, list_samplers, resolve_sampler, sample_images
from scalelong_fast.diffusion.schedule import NoiseSchedule, create_schedule, list_schedules
from scalelong_fast.diffusion.seeds import NoiseStreams, image_seeds, initial_noise

__all__ = [
    "NoiseSchedule",
    "NoiseStreams",
    "create_schedule",
    "default_steps",
    "diffusion_loss",
    "image_seeds",
    "initial_noise",
    "list_samplers",
    "list_schedules",
    "resolve_sampler",
    "sample_images",
    "stratified_uniform",
]
