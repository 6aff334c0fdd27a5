"""`python -m honeloom`, as launchers such as accelerate call it."""

from honeloom.cli.main import main

main()
