"""The C core: its sources, its build at first use, and the library that the operators call."""
