"""Language modelling: Memory Mosaics, or a Transformer, that read stories or any text."""
