"""Factorised discriminators: train any GAN from incomplete observations.

Stoller, Ewert and Dixon, "Training Generative Adversarial Networks from Incomplete Observations
using Factorised Discriminators", ICLR 2020, https://arxiv.org/abs/1905.12660
"""

from factordisc import diagnostics
from factordisc.data import ObservationLoader
from factordisc.densities import Density, Ratio, independent, markov, shared
from factordisc.discriminator import FactorisedDiscriminator
from factordisc.factorisation import Factorisation
from factordisc.losses import DiscriminatorLoss, generator_loss
from factordisc.objectives import Logistic
from factordisc.observations import Observations
from factordisc.partition import Partition
from factordisc.penalties import GradientPenalty
from factordisc.regularisers import spectral_norm
from factordisc.sampling import DependencySampler

__version__ = "0.1.0"

__all__ = [
    "Density",
    "DependencySampler",
    "DiscriminatorLoss",
    "Factorisation",
    "FactorisedDiscriminator",
    "GradientPenalty",
    "Logistic",
    "ObservationLoader",
    "Observations",
    "Partition",
    "Ratio",
    "diagnostics",
    "generator_loss",
    "independent",
    "markov",
    "shared",
    "spectral_norm",
]
