"""What surrounds the core, each part optional. The core never imports it, and a first reading can skip it."""
