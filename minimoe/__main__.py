"""`python -m minimoe` is the program `minimoe`."""
import sys

from minimoe.cli import main

sys.exit(main())
