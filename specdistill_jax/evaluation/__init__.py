"""Alignment, latency, result rows, intervals and plots."""
