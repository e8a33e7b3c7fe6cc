"""``python -m was_search`` is ``was-search``: what a Ray job starts, whose packages were shipped and not installed."""

from was_search.service.cli.main import main

if __name__ == "__main__":
    main()
