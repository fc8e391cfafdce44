"""Reinforcement learning from outcomes: GRPO on verl."""
