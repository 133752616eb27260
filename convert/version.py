"""The version of this tool, alone in a module, because `convert --version` reads nothing else."""

TOOL = "0.2.0"
"""Written into every manifest, and equal to the version in `pyproject.toml`."""
