"""Models: blocks of attention and feed-forward layers, LongNet for tokens, LongViT for images."""
