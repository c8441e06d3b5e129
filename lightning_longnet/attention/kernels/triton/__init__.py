"""The kernel "triton": all blocks of a branch in one launch, with rows read where they are."""
