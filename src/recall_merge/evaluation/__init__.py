"""Scores of models on tasks, by lm-eval."""
