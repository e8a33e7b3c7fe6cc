"""A plan applied to a transformers model: sparse projections, fused blocks, decoding steps."""
