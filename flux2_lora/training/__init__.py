"""What a training loop is made of: batches, one step, validation, checkpoints, optimizers, tracking."""
