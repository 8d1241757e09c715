"""Parts of preference.py: preference losses beside TRL's."""
