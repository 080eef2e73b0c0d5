"""What a run leaves beside its package: `report.json`, and one page that shows it."""
