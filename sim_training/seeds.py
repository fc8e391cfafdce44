"""Which seeds are for what, so that no policy is judged on a scene it was trained on."""

FIRST_EVALUATION_SEED = 10_000
"""Episodes below this seed are for training, this one and those above for evaluation."""
