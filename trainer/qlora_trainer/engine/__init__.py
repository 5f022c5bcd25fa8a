"""DeepSpeed around the model: optimizer, training step, evaluation."""
