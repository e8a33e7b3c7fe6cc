"""The database itself: embedded or by URL, its tables, migrations and roles."""
