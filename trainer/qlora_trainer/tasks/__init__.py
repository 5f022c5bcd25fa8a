"""The tasks of spec.evaluate: asked and scored by lm-evaluation-harness, answered by the ranks."""
