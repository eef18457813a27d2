"""Beyond one machine's memory: what a model needs and where it fits, before anything is loaded."""
