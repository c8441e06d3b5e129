"""Checkpoints and exported folders, and the conversion from torchscale."""
