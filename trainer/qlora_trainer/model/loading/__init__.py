"""Read the base's weights from disk, dequantized and quantized on the way."""
