"""The diagnosis of a machine: what it has, and whether ranks on it compute what one process does."""
