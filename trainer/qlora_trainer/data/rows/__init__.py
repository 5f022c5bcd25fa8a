"""Rows from files to conversations and texts, before a chat template or a tokenizer sees them."""
