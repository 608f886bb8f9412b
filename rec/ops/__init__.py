"""What surrounds the core, each part optional: a first reading can skip it. Only the commands import it."""
