"""Bundles put to work: an OpenAI-compatible server and batch files, each bundle in a worker process of its own."""
