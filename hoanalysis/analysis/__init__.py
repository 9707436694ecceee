"""What the summaries say: numpy and xarray only, on stored Datasets of one checkpoint or a series."""
