"""Postgres: the server and its schema, studies and what is kept for them, and the dashboard."""
