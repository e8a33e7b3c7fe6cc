"""From text to token ids under a frozen protocol; the three splits never overlap."""
