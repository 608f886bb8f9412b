"""Bundles: numbered SavedModel directories, what they compute, and two of them as one recommender."""
