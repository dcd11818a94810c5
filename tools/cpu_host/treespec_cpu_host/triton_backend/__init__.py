"""A Triton backend that compiles nothing: its presence is what vLLM looks for."""
