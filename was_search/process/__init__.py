"""What every process of ours shares: logs, signals, redaction of secrets, and words for mistyped names."""
