"""The quantized base model, its adapter, attention, kernels, loss and tokenizer."""
