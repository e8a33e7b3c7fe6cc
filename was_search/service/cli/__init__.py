"""The command line: commands in one file a group, and how settings become their options."""
