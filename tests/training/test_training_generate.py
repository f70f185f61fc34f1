"""Samples of a run: which labels, which settings, and what an image depends on."""

import dataclasses

import numpy as np
import pytest
import torch

from scalelong_fast.diffusion import create_schedule, image_seeds, sample_images
from scalelong_fast.errors import UserError
from scalelong_fast.models import UViT
from scalelong_fast.training import SampleConfig, generate
from scalelong_fast.training.figures import image_grid, save_loss_curve, save_png
from scalelong_fast.training.generate import check_labels

UNCONDITIONAL = {"model.num_classes": -1, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0}


def random_model(config):
    """Fresh weights, made large enough for labels and steps to show in the pixels."""
    torch.manual_seed(3)
    model = UViT(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def config(tiny):
    return dataclasses.replace(tiny(), sample=SampleConfig(sampler="dpm-solver++", steps=4, guidance=1.5))


@pytest.fixture(scope="module")
def model(config):
    return random_model(config)


class TestLabels:
    def test_all_but_the_null_class_by_default(self, config):
        assert check_labels(None, config) == list(range(10))

    def test_order_is_kept(self, config):
        assert check_labels([3, 1, 3], config) == [3, 1, 3]

    def test_the_null_class_is_refused_with_the_reason(self, config):
        with pytest.raises(UserError, match=r"--labels: got 10, expected 0 … 9\. 10 is the null class"):
            check_labels([1, 10], config)

    @pytest.mark.parametrize("label", [-1, 11, 1000])
    def test_out_of_range(self, config, label):
        with pytest.raises(UserError, match=rf"--labels: got {label}, expected 0 … 9"):
            check_labels([label], config)

    def test_unconditional(self, tiny):
        assert check_labels(None, tiny(UNCONDITIONAL)) is None
        with pytest.raises(UserError, match=r"--labels: got \[3\], expected none, since the model is unconditional"):
            check_labels([3], tiny(UNCONDITIONAL))


class TestGenerate:
    def test_shapes_and_order(self, model, config):
        images, labels = generate(model, config, labels=[7, 2], num_per_label=3)
        assert images.shape == (6, 8, 8, 1)
        assert images.dtype == np.uint8
        assert labels.tolist() == [7, 7, 7, 2, 2, 2]
        assert labels.dtype == np.int64

    def test_unconditional_images_are_labelled_minus_one(self, tiny):
        config = tiny(UNCONDITIONAL)
        images, labels = generate(random_model(config), config, num_per_label=3)
        assert images.shape == (3, 8, 8, 1)
        assert labels.tolist() == [-1, -1, -1]
        assert labels.dtype == np.int64

    def test_the_batch_size_does_not_matter(self, model, config):
        whole, _ = generate(model, config, num_per_label=3)
        for batch_size in (1, 7):
            assert np.array_equal(generate(model, config, num_per_label=3, batch_size=batch_size)[0], whole)

    def test_an_image_does_not_depend_on_the_others(self, model, config):
        whole, labels = generate(model, config, num_per_label=3)
        alone, _ = generate(model, config, labels=[4], num_per_label=2)
        assert np.array_equal(whole[labels == 4][:2], alone)

    def test_images_labels_and_seeds_differ(self, model, config):
        images, _ = generate(model, config, labels=[0, 1], num_per_label=2)
        other, _ = generate(model, config, labels=[0, 1], num_per_label=2, seed=1)
        assert len(np.unique(np.concatenate([images, other]), axis=0)) == 8

    def test_the_settings_are_the_runs_by_default(self, model, config):
        schedule = create_schedule("vpsde")
        samples = sample_images(
            model,
            schedule,
            image_shape=(1, 8, 8),
            seeds=image_seeds(0, 2, 5),
            y=torch.tensor([5, 5]),
            null_y=10,
            guidance=1.5,
            sampler="dpm-solver++",
            steps=4,
        )
        expected = ((samples + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        images, _ = generate(model, config, labels=[5], num_per_label=2)
        assert np.array_equal(images, expected)

    @pytest.mark.parametrize("change", [{"guidance": 3.0}, {"guidance": 1.0}, {"steps": 5}, {"sampler": "ddim"}])
    def test_each_setting_can_be_overridden(self, model, config, change):
        base, _ = generate(model, config, labels=[5])
        assert not np.array_equal(generate(model, config, labels=[5], **change)[0], base)

    def steps_taken(self, model, config, **settings):
        totals = []
        generate(model, config, labels=[0], progress=lambda done, total: totals.append(total), **settings)
        assert len(totals) == totals[0]
        return totals[0]

    def test_steps_are_the_runs_for_the_runs_sampler_only(self, model, config):
        assert self.steps_taken(model, config) == 4
        assert self.steps_taken(model, config, sampler="dpm-solver++") == 4
        assert self.steps_taken(model, config, sampler="ddim") == 50
        assert self.steps_taken(model, config, sampler="ddim", steps=3) == 3

    @pytest.mark.parametrize("alias", ["dpmpp", "DPM-Solver++", "dpm_solver++"])
    def test_another_spelling_of_the_runs_sampler_is_the_runs_sampler(self, model, config, alias):
        assert self.steps_taken(model, config, sampler=alias) == 4

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"num_per_label": 0}, "--num-per-label"),
            ({"seed": -1}, "--seed"),
            ({"seed": 2**63}, "--seed"),
            ({"steps": 0}, "--steps"),
            ({"steps": 1001}, "--steps"),
            ({"batch_size": 0}, "--batch-size"),
            ({"guidance": -1.0}, "--guidance"),
            ({"guidance": float("nan")}, "--guidance"),
            ({"sampler": "dimm"}, "sampler"),
        ],
    )
    def test_bad_settings_are_refused_by_name(self, model, config, settings, name):
        with pytest.raises(UserError, match=f"^{name}: got"):
            generate(model, config, labels=[0], **settings)

    def test_guidance_needs_a_null_class(self, tiny):
        config = tiny({"model.num_classes": 10, "diffusion.label_dropout": 0.0, "sample.guidance": 1.0})
        with pytest.raises(UserError, match=r"--guidance: got 2\.0, expected 1, since the run had no label dropout"):
            generate(random_model(config), config, guidance=2.0)

    def test_an_sde_sampler_does_not_suit_a_discrete_schedule(self, tiny, model):
        config = tiny({"diffusion.schedule": "ddpm"})
        with pytest.raises(UserError, match="vpsde"):
            generate(model, config, labels=[0], sampler="euler-maruyama", steps=2)


class TestFigures:
    def test_small_images_are_enlarged_and_kept_apart(self):
        images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * 100 * np.ones((1, 8, 8, 1), np.uint8)
        grid = image_grid(images, columns=2)
        assert grid.shape == (2 * 48 + 2, 2 * 48 + 2, 3)
        assert (grid[:48, :48] == 0).all()
        assert (grid[:48, 50:] == 100).all()
        assert (grid[50:, :48] == 200).all()
        assert (grid[50:, 50:] == 255).all()
        assert (grid[48:50] == 255).all()

    def test_large_colour_images_keep_their_pixels(self):
        image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
        assert np.array_equal(image_grid(image, columns=1), image[0])

    def test_a_png_holds_the_pixels(self, tmp_path):
        image_module = pytest.importorskip("PIL.Image")
        picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        save_png(tmp_path / "x.png", picture)
        with image_module.open(tmp_path / "x.png") as opened:
            assert np.array_equal(np.asarray(opened), picture)

    @pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": 1.0}], [{"step": s, "loss": 1 / s} for s in (1, 2, 3)]])
    def test_a_loss_curve_of_any_length(self, tmp_path, rows):
        save_loss_curve(tmp_path / "loss.png", rows, "title")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
