"""optuna-dashboard served on our database. What a study's page shows is made in `was_search.service.reports.page`."""
