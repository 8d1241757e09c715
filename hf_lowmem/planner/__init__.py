"""The weight of a step before it runs. Nothing yet."""
