"""Scripts: parse, call, print."""
