"""What one attention layer learns: frozen random query-key maps, ReLU, and values that are fitted.

Fu, Guo, Bai, Mei 2023, arXiv 2307.11353. Not to be taken for random features that approximate a
softmax: nothing is approximated here.

    relu_mean   the score type, ReLU(score) / N, as an attention for any layer
    model       the model: M frozen heads, of which only the value vectors are fitted; its baseline
    ridge       the fit, in closed form, for many ridges at once
    kernel      what the model becomes with infinitely many heads
    targets     the functions that it is to learn, their complexity, and the bound on its risk
"""

from foveate.methods.random_features.kernel import arc_cosine, attention_kernel
from foveate.methods.random_features.model import (
    RandomFeatureAttention,
    RandomFeatureMLP,
    RandomFeatures,
)
from foveate.methods.random_features.relu_mean import ReluMean
from foveate.methods.random_features.ridge import RidgePath, ridge
from foveate.methods.random_features.targets import (
    Target,
    complexity,
    excess_risk_bound,
    on_sphere,
    targets,
)

__all__ = [
    "RandomFeatureAttention",
    "RandomFeatureMLP",
    "RandomFeatures",
    "ReluMean",
    "RidgePath",
    "Target",
    "arc_cosine",
    "attention_kernel",
    "complexity",
    "excess_risk_bound",
    "on_sphere",
    "ridge",
    "targets",
]
