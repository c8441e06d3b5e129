"""LightningModules, their metrics and their optimiser."""
