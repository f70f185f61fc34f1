"""Oscillation of matrix UNets in training: the networks that Theorems 3.1 and 3.3 are about (ScaleLong Eq. 3)."""

from scalelong_fast.analysis.matrix_training import MatrixTraining
from scalelong_fast.analysis.oscillation import OscillationSettings

SCALES = {
    "smoke": OscillationSettings(MatrixTraining(steps=20, seeds=(0, 1)), every=2, warmup=0),
    "digits": OscillationSettings(MatrixTraining(), warmup=0),
}
