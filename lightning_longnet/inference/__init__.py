"""Generation with a cache whose size does not depend on the length of the text."""
