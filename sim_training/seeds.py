"""Which seeds are for what, so that no policy is judged on a scene it was trained on."""

FIRST_VALIDATION_SEED = 9_000
"""Reinforcement learning draws its initial states below this seed, and looks at its greedy policy on those
from here up to ``FIRST_EVALUATION_SEED``."""

FIRST_EVALUATION_SEED = 10_000
"""Episodes below this seed are for training, this one and those above for evaluation."""
