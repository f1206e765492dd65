"""What users did and what they thought of it: kept in SQLite, read for the next request, made into training data."""
