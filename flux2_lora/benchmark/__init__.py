"""What scripts/bench_gpu.py measures: ways to train one base on one card, in processes that take turns."""
