"""Rows of tokens, whatever their source: tasks, vocabulary, shards, quality metrics."""
