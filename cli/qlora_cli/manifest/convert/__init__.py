"""Convert configurations of other fine-tuning tools: axolotl, LLaMA-Factory, TRL's SFT script."""
