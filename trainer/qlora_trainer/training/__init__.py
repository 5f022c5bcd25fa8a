"""One attempt from loading to publishing; :mod:`qlora_trainer.training.train` is the page to read first."""
