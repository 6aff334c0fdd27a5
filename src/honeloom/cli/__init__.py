"""The command line: one file per command; parse, validate, call the verb, print the path."""
