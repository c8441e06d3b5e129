"""A run before it is launched: what it holds, sends and takes, worked out without a GPU and without other ranks."""
