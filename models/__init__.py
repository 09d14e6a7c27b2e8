"""Language models as flax.nnx modules: arrays in, arrays out."""
