"""Record and watch signs of life of the ranks of one worker. Imports no torch."""
