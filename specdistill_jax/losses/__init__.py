"""Divergences (per token, unreduced) and the objectives that pool them."""
