"""Captioned images to latents and text features, by tiny networks of the real classes."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scalelong_fast.data.packed import PackedSet
from scalelong_fast.data.prepare import RECIPES, PrepareOptions, Request, prepare
from scalelong_fast.data.prepare.encoders import ImageEncoder, TextEncoder
from scalelong_fast.data.prepare.latents import LatentPacker
from scalelong_fast.errors import UserError

Image = pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CAPTIONS = [["a cat", "cat"], ["dog"], ["a dog and a cat", "b", "c"], ["d"], ["e", "f"]]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a small AutoencoderKL and of a small CLIP text model with its tokenizer."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).save_pretrained(root / "vae")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    start, end = len(words) - 2, len(words) - 1
    (root / "clip").mkdir()
    (root / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "clip" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    special = {"bos_token": "<|startoftext|>", **{f"{name}_token": "<|endoftext|>" for name in ("eos", "pad", "unk")}}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 7, **special}
    (root / "clip" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    transformers.CLIPTextModel(config).save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder of five images and its annotations."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "train2014").mkdir()
    values = {"images": [], "annotations": []}
    for index, captions in enumerate(CAPTIONS):
        name = f"COCO_{index:03d}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(root / "train2014" / name)
        values["images"].append({"id": index, "file_name": name})
        values["annotations"] += [{"image_id": index, "caption": caption} for caption in captions]
    (root / "captions.json").write_text(json.dumps(values))
    return root


def request(coco, encoders, out, **options):
    options = {"size": 32, "batch_size": 2, "workers": 1, **options}
    names = {"autoencoder": str(encoders / "vae"), "text_encoder": str(encoders / "clip")}
    return Request(
        RECIPES["coco256"],
        Path(out),
        torch.device("cpu"),
        PrepareOptions(source=str(coco / "train2014"), captions=coco / "captions.json", **{**names, **options}),
    )


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def bfloat16(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two images."""
    monkeypatch.setattr(LatentPacker, "sample_bytes", lambda self: (512 << 20) // 2)


def test_captioned_images_become_moments_and_text(coco, encoders, tmp_path, small_shards):
    prepare(request(coco, encoders, tmp_path / "out"))
    dataset = PackedSet(tmp_path / "out")
    assert (len(dataset), dataset.latent, dataset.image_shape) == (5, True, (4, 4, 4))
    assert (dataset.text_shape, dataset.num_captions) == ((7, 16), 3)
    assert dataset.latent_scale == 0.18215
    assert dataset.num_classes == 0

    vae = diffusers.AutoencoderKL.from_pretrained(encoders / "vae").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(encoders / "clip"))
    clip = transformers.CLIPTextModel.from_pretrained(str(encoders / "clip")).eval()

    def text(caption):
        tokens = tokenizer([caption], max_length=7, padding="max_length", truncation=True, return_tensors="pt")
        return clip(tokens["input_ids"]).last_hidden_state[0]

    with torch.inference_mode():
        for index, captions in enumerate(CAPTIONS):
            image = Image.open(coco / "train2014" / f"COCO_{index:03d}.jpg").crop((4, 0, 44, 40))
            pixels = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
            x = torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1
            moments = vae.encode(x).latent_dist.parameters[0]
            for number, caption in enumerate(captions):
                batch = dataset.fetch(torch.tensor([index]), np.array([number], np.uint64))
                # A bfloat16 has 8 bits: half a unit in the last place, and what another batch size changes.
                torch.testing.assert_close(batch.moments[0].float(), moments, rtol=2**-7, atol=1e-5)
                torch.testing.assert_close(batch.text[0].float(), text(caption), rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(dataset.null_text.float(), text(""), rtol=2**-7, atol=1e-5)


def test_the_manifest_names_the_encoders(coco, encoders, tmp_path):
    manifest = prepare(request(coco, encoders, tmp_path / "out"))
    facts = manifest.plan.preparation
    assert facts["autoencoder"]["name"] == str(encoders / "vae")
    assert facts["autoencoder"]["diffusers"] == diffusers.__version__
    assert facts["text_encoder"]["transformers"] == transformers.__version__
    assert len(facts["autoencoder"]["weights_sha256"]) == len(facts["text_encoder"]["weights_sha256"]) == 16
    assert facts["crop"]["name"] == "lanczos"
    assert manifest.plan.source["captions"]["count"] == 9


def test_an_interrupted_encoding_goes_on_to_the_same_bytes(coco, encoders, tmp_path, small_shards, monkeypatch):
    prepare(request(coco, encoders, tmp_path / "whole"))
    real = LatentPacker.pack

    def pack(self, samples, tick):
        if samples.start == 2:
            raise KeyboardInterrupt
        return real(self, samples, tick)

    with monkeypatch.context() as patch:
        patch.setattr(LatentPacker, "pack", pack)
        with pytest.raises(KeyboardInterrupt):
            prepare(request(coco, encoders, tmp_path / "part"))
    assert not (tmp_path / "part" / "manifest.json").exists()
    prepare(request(coco, encoders, tmp_path / "part"))
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_images_that_cannot_be_read_take_their_captions_with_them(coco, encoders, tmp_path, small_shards):
    root = shutil.copytree(coco, tmp_path / "coco")
    for index in (1, 4):
        (root / "train2014" / f"COCO_{index:03d}.jpg").write_bytes(b"not an image")
    # Three images in the first shard, so that one of its batches has a broken image; the other shard has one and one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentPacker, "sample_bytes", lambda self: (512 << 20) // 3)
        manifest = prepare(request(root, encoders, tmp_path / "out", skip_unreadable=True))
    assert manifest.skipped == ["COCO_001.jpg", "COCO_004.jpg"]
    prepare(request(coco, encoders, tmp_path / "whole"))
    part, whole = PackedSet(tmp_path / "out"), PackedSet(tmp_path / "whole")
    for index, of in enumerate((0, 2, 3)):
        for number in range(len(CAPTIONS[of])):
            captions = np.array([number], np.uint64)
            found, expected = part.fetch(torch.tensor([index]), captions), whole.fetch(torch.tensor([of]), captions)
            # Batches of another size may round otherwise.
            torch.testing.assert_close(found.moments.float(), expected.moments.float(), rtol=2**-7, atol=1e-5)
            torch.testing.assert_close(found.text.float(), expected.text.float(), rtol=2**-7, atol=1e-5)


def test_other_weights_under_the_same_name_are_noticed(coco, encoders, tmp_path):
    prepare(request(coco, encoders, tmp_path / "out"))
    vae = diffusers.AutoencoderKL.from_pretrained(encoders / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"autoencoder\.weights_sha256 was '\w+', now '\w+'"):
        prepare(request(coco, encoders, tmp_path / "out", autoencoder=str(tmp_path / "vae")))


def test_a_pipelines_folder_holds_both_encoders(encoders, tmp_path):
    (tmp_path / "pipeline").mkdir()
    for name, target in (("vae", "vae"), ("tokenizer", "clip"), ("text_encoder", "clip")):
        (tmp_path / "pipeline" / name).symlink_to(encoders / target)
    cpu = torch.device("cpu")
    assert (
        ImageEncoder(str(tmp_path / "pipeline"), cpu).facts()["weights_sha256"]
        == (ImageEncoder(str(encoders / "vae"), cpu).facts()["weights_sha256"])
    )
    text = TextEncoder(str(tmp_path / "pipeline"), cpu).encode(["a cat", ""])
    assert bfloat16(text).shape == (2, 7, 16)
    assert np.array_equal(text, TextEncoder(str(encoders / "clip"), cpu).encode(["a cat", ""]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autoencoder": "/no/such/folder"}, r"--autoencoder: got '/no/such/folder'.*no such folder"),
        ({"text_encoder": "./nothing"}, r"--text-encoder: got '\./nothing'"),
        ({"size": 36}, r"--size: got 36, expected a multiple of 8"),
    ],
)
def test_bad_encoders_are_refused(coco, encoders, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(request(coco, encoders, tmp_path / "out", **options))


def test_a_missing_package_is_explained(encoders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'transformers .*pip install "scalelong_fast\[prepare\]"'):
        TextEncoder(str(encoders / "clip"), torch.device("cpu"))


@pytest.mark.parametrize("option", ["autoencoder", "text_encoder"])
def test_a_folder_of_something_else_is_named(coco, encoders, tmp_path, option):
    (tmp_path / "empty").mkdir()
    argument = "--" + option.replace("_", "-")
    with pytest.raises(UserError, match=rf"{argument}: '.*empty' cannot be loaded as"):
        prepare(request(coco, encoders, tmp_path / "out", **{option: str(tmp_path / "empty")}))
