"""Retrieval: the few hundred items out of the whole catalogue that a user may like."""
