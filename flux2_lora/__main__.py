"""`python -m flux2_lora`, which is what torchrun and `accelerate launch` start: `torchrun ... -m flux2_lora train`."""

import sys

from flux2_lora.cli import main

sys.exit(main())
