"""How the paper measured: FID protocols of ScaleLong and of U-ViT's released code, as data."""

from dataclasses import dataclass
from typing import Literal

from scalelong_fast.errors import unknown_name

#: Where an image's label comes from: the same number of each class; drawn with the frequencies of the reference's
#: labels; or the text features of a data set's captions. A model without a condition needs none.
Condition = Literal["balanced", "data", "text", "none"]


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    Attributes:
        name: what ``--protocol`` calls it: the start of the names of its presets and data sets, and the images.
        images: number of generated images.
        sampler, steps, guidance: how they are drawn. The guidance weight w is that of null + w (conditional − null);
            U-ViT's code counts from 0, so that its scale s is our w = s + 1.
        condition: where labels or prompts come from.
        reference: what they are compared with.
        extractor: whose features are compared.
        source: where these facts are stated.
        note: what the released code does otherwise, or what else one should know.
    """

    name: str
    images: int
    sampler: str
    steps: int
    guidance: float
    condition: Condition
    reference: str
    extractor: str
    source: str
    note: str = ""


_DPM_NOTE = (
    "The released code runs DPM-Solver-fast (third order, single steps), ours DPM-Solver++ (second order, multistep) "
    "with as many evaluations of the network."
)

#: Protocols by name. Numbers from the configs that were released with U-ViT and ScaleLong.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "cifar10-50k",
            images=50_000,
            sampler="euler-maruyama",
            steps=1000,
            guidance=1.0,
            condition="none",
            reference="the 50,000 training images of CIFAR-10",
            extractor="inception",
            source="sail-sg/ScaleLong cifar10_config.py; baofff/U-ViT configs/cifar10_uvit.py",
        ),
        Protocol(
            "celeba64-50k",
            images=50_000,
            sampler="euler-maruyama",
            steps=1000,
            guidance=1.0,
            condition="none",
            reference="training images of CelebA, cropped to 128 and resized to 64",
            extractor="inception",
            source="baofff/U-ViT configs/celeba64_uvit.py, datasets.py",
            note="The released code compares with statistics of 50,000 of the training images.",
        ),
        Protocol(
            "imagenet64-50k",
            images=50_000,
            sampler="dpm-solver++",
            steps=50,
            guidance=1.0,
            condition="data",
            reference="training images of ImageNet at 64×64",
            extractor="inception",
            source="baofff/U-ViT configs/imagenet64_uvit_mid.py, configs/imagenet64_uvit_large.py, datasets.py",
            note=f"{_DPM_NOTE} It compares with the statistics released with guided-diffusion.",
        ),
        Protocol(
            "coco-30k",
            images=30_000,
            sampler="dpm-solver++",
            steps=50,
            guidance=2.0,
            condition="text",
            reference="validation images of MS-COCO 2014 at 256×256",
            extractor="inception",
            source="baofff/U-ViT configs/mscoco_uvit.py (scale=1), eval_t2i_discrete.py, datasets.py",
            note="Prompts are captions of the validation images, one at random of each.",
        ),
        Protocol(
            "digits-10k",
            images=10_000,
            sampler="dpm-solver++",
            steps=50,
            guidance=2.0,
            condition="balanced",
            reference="scikit-learn's 1,797 handwritten digits",
            extractor="digits",
            source="ours: the paper has none",
        ),
    )
}


def list_protocols() -> list[str]:
    """Names of the protocols."""
    return list(PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in PROTOCOLS:
        raise unknown_name("--protocol", name, ["auto", *PROTOCOLS])
    return PROTOCOLS[name]


def protocol_for(*names: str | None) -> Protocol | None:
    """The protocol of a preset or data set: of the first of ``names`` that has one, or None."""
    for name in names:
        for protocol in PROTOCOLS.values():
            if name and name.startswith(protocol.name.split("-")[0]):
                return protocol
    return None
