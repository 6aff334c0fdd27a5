"""One runner per verb, each readable from top to bottom: load, build the port, call, write, verify."""
