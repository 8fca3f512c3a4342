"""`python -m mlrn_arch VERB`, the same as `mlrn VERB`."""

import sys

from mlrn_cli import main

sys.exit(main())
