"""What `train` does around learning and knows all of its options for: refusals, where a run starts, what it says."""
