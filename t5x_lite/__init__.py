"""t5x_lite: a text-to-text training stack in JAX and Flax."""
