"""The paper's figures and theorems as measurements: each gives numbers, a figure and a sentence (a Finding)."""

from scalelong_fast.analysis.ablation import AblationSettings, analyze_ablation
from scalelong_fast.analysis.bounds import BoundsSettings, check_bounds
from scalelong_fast.analysis.convergence import ConvergenceSettings, analyze_convergence
from scalelong_fast.analysis.finding import Finding, write_finding
from scalelong_fast.analysis.kappa_range import KappaRange, suggest_range
from scalelong_fast.analysis.learnt_kappa import LearntKappaSettings, analyze_learnt_kappa
from scalelong_fast.analysis.lipschitz import LipschitzSettings, analyze_lipschitz
from scalelong_fast.analysis.matrix_training import MatrixTraining
from scalelong_fast.analysis.matrix_unet import MatrixUNet
from scalelong_fast.analysis.noise import NoiseSettings, analyze_kappa_range, analyze_noise
from scalelong_fast.analysis.oscillation import OscillationSettings, analyze_oscillation
from scalelong_fast.analysis.robustness import RobustnessSettings, analyze_robustness
from scalelong_fast.analysis.training import Training
from scalelong_fast.analysis.units import Units

__all__ = [
    "AblationSettings",
    "BoundsSettings",
    "ConvergenceSettings",
    "Finding",
    "KappaRange",
    "LearntKappaSettings",
    "LipschitzSettings",
    "MatrixTraining",
    "MatrixUNet",
    "NoiseSettings",
    "OscillationSettings",
    "RobustnessSettings",
    "Training",
    "Units",
    "analyze_ablation",
    "analyze_convergence",
    "analyze_kappa_range",
    "analyze_learnt_kappa",
    "analyze_lipschitz",
    "analyze_noise",
    "analyze_oscillation",
    "analyze_robustness",
    "check_bounds",
    "suggest_range",
    "write_finding",
]
