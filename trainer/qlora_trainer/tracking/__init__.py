"""Send a run's history to tracking tools (TensorBoard, MLflow, Weights & Biases), apart from the ranks."""
