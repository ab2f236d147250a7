"""`python -m llmserve_env` is `llmserve`."""

import sys

from llmserve_env.cli import main

sys.exit(main())
