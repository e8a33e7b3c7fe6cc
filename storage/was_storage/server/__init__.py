"""The database: embedded or by URL, its schema, migrations and roles."""
