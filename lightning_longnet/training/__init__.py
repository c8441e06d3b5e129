"""LightningModules for the models, their metrics and their optimisers."""
