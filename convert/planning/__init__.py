"""Plan a conversion. Pure: names and shapes in, block copies out."""
