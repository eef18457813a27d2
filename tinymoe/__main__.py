"""`python -m tinymoe` is the `tinymoe` command."""

import sys

from tinymoe.cli import main

sys.exit(main())
