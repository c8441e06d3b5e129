"""Models: LongNet for tokens and LongViT for images, from the same blocks of attention and feed-forward."""
