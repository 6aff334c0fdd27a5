"""A zoo of models made one: what the whole is set by, which mixture is taken, and what is advised."""
