"""Raw files -> a dataset directory. A module a source, each a command: dummy, movielens, tabular."""
