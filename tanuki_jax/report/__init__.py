"""What a run writes for people: the page report.html, and live metrics for trackers."""
