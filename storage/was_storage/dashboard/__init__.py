"""optuna-dashboard on our database: pages of studies, plans to download."""
