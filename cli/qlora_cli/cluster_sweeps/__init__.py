"""QLoRASweeps in a cluster: what is listed, shown, watched and reported of them."""
