"""What a server needs beyond the models: limits, tokens, metrics, several processes, new versions, TF Serving."""
