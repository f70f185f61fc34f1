import pytest
import torch

from scalelong_fast.analysis import Training


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_training():
    """``tiny_training(**changes)``: networks of one long skip, trained for four steps."""

    def make(**changes):
        return Training(**({"depth": 2, "steps": 4, "batch_size": 4, "seeds": (0, 1)} | changes))

    return make
