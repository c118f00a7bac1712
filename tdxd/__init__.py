"""tdxd: serving sealed models on machines that nobody has to trust."""

__version__ = "0.1.0"
