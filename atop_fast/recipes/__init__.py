"""A recipe and its run: options, schema, stages, budget, the demo and the presets."""
