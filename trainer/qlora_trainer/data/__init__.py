"""From a file of rows to the micro-batches of a step.

::

    rows     ──► formats, chat ──► tokenized ──► packing ──► batches
    (of files)   (tokens that      (arrays on    (which rows   (what each rank
                  count)            disk)         share a       computes in
                                                  sequence)     step n)
    └──────────────── prepare: once, before any GPU is held ┘

Ranks start at :func:`qlora_trainer.prepare.tokenize_rows.load_prepared_data`. They never tokenize: the others would
wait in a collective meanwhile, until its timeout (LlamaFactory#2424, accelerate#2528).
"""
