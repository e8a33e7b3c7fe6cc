"""Passes of a masked model: scores, histograms, prices, slopes, losses."""
