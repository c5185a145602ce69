"""Search strategies, one file per family."""
