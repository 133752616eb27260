"""The tables: model families, the layouts that they come in, targets, MaxText's trees."""
