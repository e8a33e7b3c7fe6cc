"""Postgres: engine, schema, studies, slots, caches."""
