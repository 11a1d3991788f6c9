"""`python -m seed_multimodal` is the console command `seed`."""

import sys

from seed_multimodal.cli.main import main

sys.exit(main())
