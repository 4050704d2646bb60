"""How the bundled miniature is made and judged: `scripts/pretrain_tiny.py` and `scripts/prove_demo.py` run it."""
