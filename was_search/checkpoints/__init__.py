"""A model's files: found, checked before anything is built of them, loaded, rounded, laid out for decoding."""
