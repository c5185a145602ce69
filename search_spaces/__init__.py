"""Search spaces, one file per family."""
