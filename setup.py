"""The package lies in src/text_diffusion; `pip install .` installs it, though a clone runs without that."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """The package's version, without importing it (torch need not be there yet)."""
    found = re.search(r'^__version__ = "(.+)"$', read("src/text_diffusion/__init__.py"), re.MULTILINE)
    assert found, "src/text_diffusion/__init__.py has no line __version__ = ..."
    return found[1]


setup(
    name="text-diffusion",
    version=version(),
    description="Text diffusion models: Gaussian diffusion in the space of word embeddings, in PyTorch",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    author="the text-diffusion authors",
    license="MIT",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src", include=["text_diffusion", "text_diffusion.*"]),
    package_data={"text_diffusion": ["py.typed", "visual/*.css", "visual/*.js"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy>=1.26", "tokenizers>=0.20", "tqdm>=4.66"],
    extras_require={
        "eval": ["sacrebleu>=2.4", "wordllama>=0.4"],
        "fsdp": ["safetensors>=0.4"],
        "pretrained": ["safetensors>=0.4", "huggingface_hub>=0.26"],
        "mpi": ["mpich>=4.2", "mpi4py>=4.0"],
        "remote": ["blobfile>=3.0"],
        "viz": ["matplotlib>=3.9", "pillow>=10.1", "rich>=13.7"],
        "track": ["tensorboard>=2.18", "wandb>=0.18"],
        "dev": re.findall(r"^\w.*", read("requirements-dev.txt"), re.MULTILINE),
    },
    entry_points={"console_scripts": ["text-diffusion = text_diffusion.__main__:main"]},
)
