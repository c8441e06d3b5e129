"""Reading of checkpoints, export of models to folders, and conversion of models of torchscale."""
