"""Loading of recipes and settings: YAML in, frozen configs out."""
