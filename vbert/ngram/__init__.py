"""Representations of single n-grams, stored once for every text that has them (SkipBERT, Wang et al. 2022)."""
