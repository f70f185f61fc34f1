"""Extractors: what they take, how they are named, and what is said where one is not to be had."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from scalelong_fast.errors import UserError
from scalelong_fast.evaluation import FeatureExtractor, create_extractor, extractors
from scalelong_fast.evaluation.digits_classifier import FEATURES, train_digits_classifier
from scalelong_fast.evaluation.extractors import weights_fingerprint
from scalelong_fast.evaluation.steps import check_alike, identify
from scalelong_fast.training.ranks import Ranks

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("networks_for_extractor_tests", None)


def network(name):
    return f"networks_for_extractor_tests:{name}"


class TestDigits:
    def test_it_knows_the_digits(self, digits, classifier):
        features = classifier(digits.images.expand(-1, 3, -1, -1))
        assert features.shape == (1797, FEATURES)
        assert (classifier.head(features).argmax(1) == digits.labels).float().mean() > 0.97

    @pytest.mark.parametrize("threads", [2])
    def test_training_again_gives_the_same_weights(self, classifier, threads):
        before, state = torch.get_num_threads(), torch.random.get_rng_state()
        torch.set_num_threads(threads)
        try:
            again = train_digits_classifier()
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        assert weights_fingerprint(again) == weights_fingerprint(classifier)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_grey_images_are_repeated(self, digits, extractor):
        grey = digits.images[:5]
        assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))

    def test_other_sizes_are_refused(self, extractor):
        with pytest.raises(UserError, match=r"--extractor: got 'digits for images of 3×9×8'"):
            extractor(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))

    def test_all_processes_take_the_weights_of_the_first(self, classifier, monkeypatch):
        from scalelong_fast.evaluation import extractors

        state = classifier.state_dict()

        class Second(Ranks):
            def broadcast(self, value):
                return state

        monkeypatch.setattr(extractors, "train_digits_classifier", lambda: pytest.fail("trained again"))
        assert create_extractor("digits", ranks=Second(1, 2)).fingerprint == weights_fingerprint(classifier)


class TestAnyNetwork:
    def test_a_factory(self):
        extractor = create_extractor(network("means"))
        assert extractor(IMAGES).shape == (4, 12)
        assert vars(extractor.identity()) == {
            "name": network("means"),
            "fingerprint": extractor.fingerprint,
            "width": 12,
        }

    def test_a_class_is_a_factory_too(self):
        assert torch.equal(create_extractor(network("Means"))(IMAGES), create_extractor(network("means"))(IMAGES))

    def test_no_gradients_and_no_training_mode(self):
        extractor = FeatureExtractor("x", nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 64)), nn.Flatten()))
        assert not extractor(IMAGES).requires_grad
        dropout = create_extractor(network("Means"))
        assert not dropout.network.training

    def test_autocast_does_not_reach_it(self):
        class Float(nn.Module):
            def forward(self, images):
                flat = images.flatten(1).float()
                return flat @ flat.T

        with torch.autocast("cpu", torch.bfloat16):
            inside = FeatureExtractor("x", Float())(IMAGES)
        assert torch.equal(inside, FeatureExtractor("x", Float())(IMAGES))

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("kind", ["pt", "pt2"])
    def test_a_file(self, tmp_path, kind):
        from networks_for_extractor_tests import Means

        file = tmp_path / f"net.{kind}"
        if kind == "pt":
            torch.jit.trace(Means(), IMAGES).save(file)
        else:
            batch = torch.export.Dim.DYNAMIC
            exported = torch.export.export(Means(), (IMAGES,), dynamic_shapes=({0: batch},))
            torch.export.save(exported, file)
        extractor = create_extractor(str(file))
        torch.testing.assert_close(extractor(IMAGES[:3]), Means()(IMAGES[:3]).flatten(1))
        assert extractor.identity().name == file.name
        assert len(extractor.fingerprint) == 16

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_the_published_inception_file_is_asked_for_its_features(self, tmp_path):
        class LikeIt(nn.Module):
            def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
                features = img.float().mean([2, 3])
                if return_features:
                    return features
                return features.softmax(1)

        torch.jit.script(LikeIt()).save(tmp_path / "inception.pt")
        features = create_extractor(str(tmp_path / "inception.pt"))(IMAGES)
        torch.testing.assert_close(features, IMAGES.float().mean((2, 3)))

    def test_fingerprints_follow_the_weights(self):
        from networks_for_extractor_tests import linear

        assert weights_fingerprint(linear(0)) == weights_fingerprint(linear(0))
        assert weights_fingerprint(linear(0)) != weights_fingerprint(linear(1))
        half = linear(0).half()
        assert weights_fingerprint(half) != weights_fingerprint(linear(0))

    def test_processes_with_other_weights_are_refused(self):
        class Two(Ranks):
            def gather(self, value):
                return [value, "other"]

        extractor = create_extractor(network("means"))
        with pytest.raises(UserError, match=r"2 sets of weights in 2 processes.*seed it"):
            check_alike(identify(extractor, (3, 8, 8), CPU), Two(world=2))
        check_alike(identify(extractor, (3, 8, 8), CPU), Ranks())


class TestInception:
    def test_without_torch_fidelity(self, monkeypatch):
        fid = pytest.importorskip("torchmetrics.image.fid")
        monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(
            UserError, match=r'torch-fidelity, which is not installed: pip install "scalelong_fast\[eval\]"'
        ):
            create_extractor("inception")

    def test_without_torchmetrics(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        with pytest.raises(UserError, match=r"needs torchmetrics and torch-fidelity: pip install"):
            create_extractor("inception")

    def test_without_a_network(self, monkeypatch):
        fid = pytest.importorskip("torchmetrics.image.fid")

        def download(*_):
            raise OSError("Name or service not known")

        monkeypatch.setattr(fid, "NoTrainInceptionV3", download)
        with pytest.raises(UserError, match=r"their download failed \(OSError: Name.*give the file with --extractor-w"):
            create_extractor("inception")

    def test_weights_from_a_file(self, monkeypatch, tmp_path):
        fid = pytest.importorskip("torchmetrics.image.fid")
        file = tmp_path / "weights.pth"
        file.write_bytes(b"x")
        asked = []

        def build(*arguments):
            asked.append(arguments)
            return nn.Flatten()

        monkeypatch.setattr(fid, "NoTrainInceptionV3", build)
        assert create_extractor("inception", weights=file).name == "inception"
        assert asked == [("inception-v3-compat", ["2048"], str(file))]
        with pytest.raises(UserError, match=r"--extractor-weights: got '.*nowhere'"):
            create_extractor("inception", weights=tmp_path / "nowhere")
        with pytest.raises(UserError, match="only inception reads them"):
            create_extractor("digits", weights=file)

    def test_one_process_of_each_machine_downloads_before_the_others(self, monkeypatch):
        events = []

        class Machine(Ranks):
            def barrier(self):
                events.append("all have come")

        load = lambda weights: events.append("loaded") or nn.Identity()  # noqa: E731
        monkeypatch.setattr(extractors, "_inception", load)
        create_extractor("inception", ranks=Machine(2, 4, local_rank=0, local_world=2))
        assert events == ["loaded", "all have come"]
        events.clear()
        create_extractor("inception", ranks=Machine(3, 4, local_rank=1, local_world=2))
        assert events == ["all have come", "loaded"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("inseption", "Did you mean 'inception'"),
            ("nowhere.pt2", "a file that exists"),
            ("no.such.package:factory", "could not be imported"),
            (network("nothing"), "could not be imported"),
            (network("no_network"), "returns an nn.Module"),
            ("os:remove", "expected a factory that takes no arguments. It failed: TypeError"),
        ],
    )
    def test_names(self, name, text):
        with pytest.raises(UserError, match=r"^--extractor: got") as error:
            create_extractor(name)
        assert text in str(error.value)

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("suffix", [".pt", ".pt2"])
    def test_a_damaged_file(self, tmp_path, suffix):
        file = tmp_path / f"net{suffix}"
        file.write_bytes(b"no network")
        with pytest.raises(UserError, match=r"a network stored by torch\.export\.save"):
            create_extractor(str(file))

    @pytest.mark.parametrize(
        "images", [IMAGES.float(), IMAGES[0], IMAGES[:, :2], torch.zeros(1, 4, 8, 8, dtype=torch.uint8)]
    )
    def test_images(self, extractor, images):
        with pytest.raises(UserError, match="images: got"):
            extractor(images)

    def test_a_network_that_takes_one_number_of_images(self):
        with pytest.raises(UserError, match=r"for any N.*With 1 of them it failed: RuntimeError: I was compiled for 2"):
            identify(create_extractor(network("two_only")), (3, 8, 8), CPU)

    def test_a_network_that_mixes_images(self):
        with pytest.raises(UserError, match=r"that returns \(3,\)'"):
            identify(create_extractor(network("one_row")), (3, 8, 8), CPU)
