"""Several processes: what they are, how a model is sharded over them, and files that each writes in part."""
