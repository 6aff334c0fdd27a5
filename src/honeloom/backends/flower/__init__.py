"""Flower: what carries a federation between machines, and honeloom as a part of other Flower apps."""
