"""The QLoRASweep API: a job template, the parameters to vary, and the trials that follow from them."""
