"""Choose what the base computes with on a device: types, attention and kernels."""
