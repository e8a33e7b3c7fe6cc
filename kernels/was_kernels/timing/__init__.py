"""Decoding steps timed on a device: dense beside sparse, and the profile that predicts them."""
