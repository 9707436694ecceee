"""What the summaries say: numpy and xarray only, on stored Datasets of one checkpoint or a series.

The verbs are at ``ds.ho``; each stands in the module of its subject here, with its formula. A DataArray carries its
standard error as the coordinate ``<name>_se``, conditional on the direction u.
"""
