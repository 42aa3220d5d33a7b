"""Model families and their sizes (``table``), their configurations (``configs``), and making, saving and loading
models (``store``)."""
