"""`python -m petool_lite`."""

from petool_lite.cli import main

main()
