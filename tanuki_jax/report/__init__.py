"""What a run writes for people: the page report.html, and metrics for trackers."""
