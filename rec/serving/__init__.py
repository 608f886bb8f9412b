"""The HTTP API in front of a pair of bundles. Imports nothing of the training code."""
