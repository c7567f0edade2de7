"""Optimizer and state, the jitted update, and on-policy rollouts."""
