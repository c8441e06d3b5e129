"""Scoring and embedding of texts with a trained model, and the model of lm-evaluation-harness."""
