"""Packaging: names, version ranges and extras. Exact versions that were tested together are in constraints.txt."""

import runpy
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent

TRAIN = [
    "datasets>=3.0",
    "diffusers>=0.33",
    "huggingface_hub>=0.30",
    "matplotlib>=3.8",
    "pillow>=10.0",
    "rich>=13.7",
    "safetensors>=0.4.5",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "tensorboard>=2.16",
    "tyro>=0.9",
]

setup(
    name="scalelong_fast",
    version=runpy.run_path(str(HERE / "scalelong_fast" / "version.py"))["__version__"],
    description="Diffusion UNets and U-ViTs with scaled long skip connections (ScaleLong), fused with Triton",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # scalelong_fast/kernels is a link to kernels/, which has no __init__.py: hence namespace packages.
    package_data={"scalelong_fast.kernels": ["tables/*.json"]},
    packages=find_namespace_packages(include=["scalelong_fast", "scalelong_fast.*"]),
    install_requires=[
        "einops>=0.7",
        "numpy>=1.24",
        "torch>=2.10",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "train": TRAIN,
        # [image] brings the Inception network of FID, and torchvision, which the metrics themselves do not need.
        "eval": ["torchmetrics[image]>=1.4"],
        "prepare": [*TRAIN, "transformers>=4.44"],
        "xformers": ["xformers>=0.0.33"],
        "diffusers": ["diffusers>=0.33"],
        "dev": [
            *TRAIN,
            "hypothesis>=6.100",
            "jinja2>=3.1",
            "markdown-it-py>=3.0",
            "peft>=0.13",
            "pytest>=8.0",
            "pytest-benchmark>=4.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "torchmetrics>=1.4",
            "transformers>=4.44",
        ],
    },
    entry_points={"console_scripts": ["scalelong-fast = scalelong_fast.cli:main"]},
)
