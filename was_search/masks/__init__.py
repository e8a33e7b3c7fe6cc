"""Passes of one masked model in one process: scores, histograms, prices, slopes, losses."""
