"""The vocabulary that every room speaks: samples, sequences, batches, masks, losses, noise."""
