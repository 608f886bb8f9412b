"""Ranking: the candidates that retrieval returns, put into a better order."""
