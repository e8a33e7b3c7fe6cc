"""The coordinator of a search: its loop, the calls that it gives to workers, and contracts of pool and storage."""
