"""Run one worker: rendezvous with the others, start the ranks, watch and end them."""
