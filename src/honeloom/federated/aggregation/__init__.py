"""Rules that combine the low-rank updates of several clients, module by module."""
