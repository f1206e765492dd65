"""`bench`: generate greedy replies into results files (run), then score them and write the report (report)."""
