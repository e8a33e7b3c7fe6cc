"""was-search: find how much of each layer's input an LLM can skip while decoding."""

__version__ = "0.1.0"
