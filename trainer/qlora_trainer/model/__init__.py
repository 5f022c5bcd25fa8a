"""The quantized base model, its adapter, loss and tokenizer."""
