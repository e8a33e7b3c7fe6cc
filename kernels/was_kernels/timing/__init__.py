"""Times of decoding steps."""
